"""A real S3 server on loopback (moto's), for tests of buckets."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import boto3
import pytest
from moto.server import ThreadedMotoServer

OWN = ("AWS_", "FSSPEC_")  # variables of the machine that would change what a test sees


class Server:
    """`env`: what a process needs to reach the server. `client`: boto3's."""

    def __init__(self, url: str) -> None:
        self.env = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "hidden-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        self._buckets = 0
        with mock.patch.dict(os.environ, self.env):
            self.client: Any = boto3.client("s3")

    def bucket(self) -> str:
        """The name of a new bucket."""
        self._buckets += 1
        name = f"bucket-{self._buckets}"
        self.client.create_bucket(Bucket=name)
        return name

    def deny(self, bucket: str, *actions: str, key: str = "*") -> None:
        """From now on the bucket refuses these actions, such as PutObject, on these keys."""
        rule = {"Effect": "Deny", "Principal": "*", "Action": [f"s3:{action}" for action in actions]}
        rule["Resource"] = f"arn:aws:s3:::{bucket}/{key}"
        self.client.put_bucket_policy(Bucket=bucket, Policy=json.dumps({"Version": "2012-10-17", "Statement": [rule]}))

    def allow(self, bucket: str) -> None:
        self.client.delete_bucket_policy(Bucket=bucket)

    def files(self, bucket: str, folder: str) -> dict[str, bytes]:
        """Content of each object below the folder, by its relative name."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{folder}/")
        keys = [entry["Key"] for page in pages for entry in page.get("Contents", ())]
        return {key[len(folder) + 1 :]: self.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@pytest.fixture(scope="session")
def s3() -> Iterator[Server]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(OWN)}
    found = Server("http://{}:{}".format(*server.get_host_and_port()))
    with mock.patch.dict(os.environ, kept | found.env, clear=True):
        yield found
    server.stop()
