"""What Grafana and Prometheus need to show a cache."""
