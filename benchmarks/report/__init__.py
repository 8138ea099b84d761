"""What is shown and kept: tables, files of results, pages, figures."""
