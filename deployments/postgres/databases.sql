-- run once, on an empty volume; the database prefect is POSTGRES_DB
CREATE DATABASE mlflow;
