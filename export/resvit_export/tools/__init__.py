"""What looks around: doctor, inspect, describe, layer comparison, bench."""
