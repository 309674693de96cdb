"""What a bound port lets in."""
