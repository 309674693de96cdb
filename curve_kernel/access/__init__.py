"""Which clients a bound port accepts."""
