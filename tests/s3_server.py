"""A local S3 server, provided by moto, with one bucket."""

from __future__ import annotations

import os
import urllib.request

import boto3
import pytest
from moto.server import ThreadedMotoServer

BUCKET = "models"


class S3:
    """An S3 server that tests can stop.

    Attributes:
        home: URI of a folder in its bucket.
        client: boto3 client for inspection.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "a-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-of-this-test")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        host, port = self.server.get_host_and_port()
        # All servers of a process share their contents, so remove what earlier tests left.
        reset = urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=10).close()
        self.client = boto3.client(
            "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1"
        )
        self.client.create_bucket(Bucket=BUCKET)
        query = f"scheme=http&endpoint_override={host}:{port}&region=us-east-1"
        self.home = f"s3://{BUCKET}/some%20sweeps?{query}"

    def objects(self) -> list[str]:
        """Return the keys of all objects except the empty ones that represent folders."""
        found = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
        return sorted(entry["Key"] for entry in found if not entry["Key"].endswith("/"))

    def put(self, key: str, data: bytes) -> None:
        """Overwrite an object, as a fault would."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)

    def close(self) -> None:
        """Stop the server."""
        self.server.stop()
