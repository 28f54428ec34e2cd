"""What is measured of a model rather than trained on."""
