"""Compiles programs for TPUs that are not attached, and says what they cost there."""
