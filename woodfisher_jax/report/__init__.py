"""What a run leaves in its folder: numbers, figures, tables and pages."""
