"""The parts of ``compare_tickets.py``: data, models, methods, and the keeping and reporting of results."""
