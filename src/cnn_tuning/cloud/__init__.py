"""EC2 hosts: what they cost, how they are started, found again and removed; the S3 layout."""
