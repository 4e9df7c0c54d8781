"""A gRPC server that speaks Triton's protocol of streams and hands requests to a Python model, for the real client package."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import triton_double as double
from tritonclient.grpc import service_pb2, service_pb2_grpc

DTYPES = {"INT64": np.int64, "INT32": np.int32, "FP64": np.float64}


class Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """`config`: the model's ModelConfig; a tensor that it does not name, or of another type, is an error as in Triton."""

    def __init__(self, model: Any, config: Any) -> None:
        self._model = model
        types = {t.name: t.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number for t in config.input}
        self._inputs = {t.name: types[t.name][t.data_type].name.removeprefix("TYPE_") for t in config.input}

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for asked in requests:
            fields = {
                tensor.name: self._value(tensor, data)
                for tensor, data in zip(asked.inputs, asked.raw_input_contents, strict=True)
            }
            request = double.InferenceRequest(**fields)
            self._model.execute([request])
            request.sender.done.wait(60)
            for response in request.sender.responses:
                yield _answer(asked, response)

    def _value(self, tensor: Any, data: bytes) -> Any:
        assert tensor.datatype == self._inputs[tensor.name].replace("STRING", "BYTES"), tensor
        if tensor.datatype != "BYTES":
            return np.frombuffer(data, DTYPES[tensor.datatype]).tolist()
        texts = []
        while data:
            (size,) = struct.unpack_from("<I", data)
            texts.append(data[4 : 4 + size])
            data = data[4 + size :]
        return texts


def _answer(asked: Any, response: double.InferenceResponse) -> Any:
    if response.error is not None:
        return service_pb2.ModelStreamInferResponse(error_message=response.error.message)
    answer = service_pb2.ModelInferResponse(model_name=asked.model_name, id=asked.id)
    for name, values in response.tensors.items():
        texts = values.dtype == np.object_
        answer.outputs.add(name=name, datatype="BYTES" if texts else "INT64", shape=values.shape)
        data = b"".join(struct.pack("<I", len(v)) + v for v in values) if texts else values.tobytes()
        answer.raw_output_contents.append(data)
    return service_pb2.ModelStreamInferResponse(infer_response=answer)


@contextmanager
def serving(model: Any, config: Any) -> Iterator[int]:
    """The port of a server, for the time of the block."""
    server = grpc.server(ThreadPoolExecutor(2))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Servicer(model, config), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()
