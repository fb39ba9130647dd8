"""Commands that a person runs beside train_test.py: ``python -m tools`` lists them."""
