"""Conversion of published weights into our parameters, and back."""
