"""What others see of a running node: log, metrics, health, audit trail, service manager."""
