"""As much of the AWS command line as a boot script uses: `aws s3 cp --only-show-errors FROM TO`."""

from __future__ import annotations

import sys

import boto3


def main() -> None:
    """Copy a file to or from a bucket."""
    if sys.argv[1:4] != ["s3", "cp", "--only-show-errors"] or len(sys.argv) != 6:
        sys.exit(f"this stand-in does not know: {sys.argv[1:]}")
    source, target = sys.argv[4:]
    s3 = boto3.client("s3")
    if source.startswith("s3://"):
        bucket, _, key = source.removeprefix("s3://").partition("/")
        s3.download_file(bucket, key, target)
    else:
        bucket, _, key = target.removeprefix("s3://").partition("/")
        s3.upload_file(source, bucket, key)


if __name__ == "__main__":
    main()
