"""What comes out of a simulation: tables, metrics, files, plots and traces."""
