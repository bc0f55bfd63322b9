"""Pages: HTML files that stand alone, their charts and their words for numbers."""
