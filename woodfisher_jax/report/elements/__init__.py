"""What pages and terminals show: figures, tables, markup, numbers with units."""
