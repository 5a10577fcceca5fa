"""One thin Prefect task per step: load, call one function of charm_core, save, return a reference."""
