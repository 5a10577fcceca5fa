"""CHARM: calibrate reward models with Chatbot Arena ratings. The pure method; see README.md."""

__version__ = "0.1.0"
