"""`python -m models.convert`: adapters between formats, into models, to a lower rank, and what a file is."""
