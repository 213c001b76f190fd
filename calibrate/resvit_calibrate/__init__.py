"""Everything that feeds images and looks at values: data, statistics, ranges, metrics, the gate."""
