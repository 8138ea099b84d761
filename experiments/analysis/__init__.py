"""What is compared and measured: arms, results of runs, statistics, records."""
