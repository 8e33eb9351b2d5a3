"""Pictures of what methods keep."""
