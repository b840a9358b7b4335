"""Configuration fields that several families share."""
