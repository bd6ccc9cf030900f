"""The main job by a client that is not ours: Python, generated from the proto files.

usage: foreign.py SOCKET IMAGE LOG_DIR, with the generated modules in PYTHONPATH.
Prints `done` at the end; any surprise is an exception.
"""
import queue
import sys
import time

import grpc
from cri.runtime.v1 import runtime_pb2 as cri
from cri.runtime.v1 import runtime_pb2_grpc as cri_rpc
from longshore.v1 import event_pb2, event_pb2_grpc, image_pb2, image_pb2_grpc
from longshore.v1 import lifecycle_pb2 as life
from longshore.v1 import lifecycle_pb2_grpc as life_rpc
from longshore.v1 import network_pb2, node_pb2, node_pb2_grpc

socket, image, log_dir = sys.argv[1:4]
channel = grpc.insecure_channel(f"unix://{socket}", options=[("grpc.default_authority", "localhost")])


def until(check, what):
    for _ in range(600):
        if check():
            return
        time.sleep(0.1)
    raise SystemExit(f"never happened: {what}")


def through_cri():
    runtime, images = cri_rpc.RuntimeServiceStub(channel), cri_rpc.ImageServiceStub(channel)
    assert runtime.Version(cri.VersionRequest()).runtime_api_version == "v1"
    image_id = images.PullImage(cri.PullImageRequest(image=cri.ImageSpec(image=image))).image_ref
    assert images.ImageStatus(cri.ImageStatusRequest(image=cri.ImageSpec(image=image_id))).image.size > 0
    config = cri.PodSandboxConfig(
        metadata=cri.PodSandboxMetadata(name="snake", uid="1", namespace="foreign"),
        log_directory=log_dir,
        port_mappings=[cri.PortMapping(host_port=18099, container_port=8080)],
    )
    pod = runtime.RunPodSandbox(cri.RunPodSandboxRequest(config=config)).pod_sandbox_id
    container = runtime.CreateContainer(cri.CreateContainerRequest(
        pod_sandbox_id=pod, sandbox_config=config,
        config=cri.ContainerConfig(
            metadata=cri.ContainerMetadata(name="main"), image=cri.ImageSpec(image=image),
            command=["sh", "-c", "echo hiss; exec sleep 1000"], log_path="main.log"))).container_id
    runtime.StartContainer(cri.StartContainerRequest(container_id=container))
    status = runtime.PodSandboxStatus(cri.PodSandboxStatusRequest(pod_sandbox_id=pod)).status
    assert status.state == cri.SANDBOX_READY and status.network.ip, status
    answer = runtime.ExecSync(cri.ExecSyncRequest(container_id=container, cmd=["echo", "from exec"]))
    assert (answer.stdout, answer.exit_code) == (b"from exec\n", 0), answer
    stats = runtime.ContainerStats(cri.ContainerStatsRequest(container_id=container)).stats
    assert stats.memory.usage_bytes.value > 0, stats
    until(lambda: "hiss" in open(f"{log_dir}/main.log").read(), "the line in the log")
    try:
        runtime.ContainerStatus(cri.ContainerStatusRequest(container_id="0" * 64))
        raise SystemExit("an unknown container has a status")
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND, error
    runtime.StopPodSandbox(cri.StopPodSandboxRequest(pod_sandbox_id=pod))
    runtime.RemovePodSandbox(cri.RemovePodSandboxRequest(pod_sandbox_id=pod))
    assert not runtime.ListPodSandbox(cri.ListPodSandboxRequest()).items


def through_ours():
    lifecycle = life_rpc.LifecycleServiceStub(channel)
    updates = list(image_pb2_grpc.ImageServiceStub(channel).PullImage(image_pb2.PullImageRequest(reference=image)))
    assert updates[-1].result.image_id.startswith("sha256:"), updates[-1]
    sandbox = lifecycle.RunSandbox(life.RunSandboxRequest(config=life.SandboxConfig(
        name="snake", network=life.SandboxNetwork(
            ports=[network_pb2.PortMapping(host_port=18099, container_port=8080)])))).sandbox
    container = lifecycle.CreateContainer(life.CreateContainerRequest(
        sandbox_id=sandbox.id, config=life.ContainerConfig(
            name="main", image=image, command=["sh", "-c", "echo hiss; sleep 0.2; exit 3"]))).container
    lifecycle.StartContainer(life.StartContainerRequest(container_id=container.id))
    waited = lifecycle.WaitContainer(life.WaitContainerRequest(container_id=container.id))
    assert waited.exit.code == 3, waited
    lines = [entry.data for part in lifecycle.Logs(life.LogsRequest(container_id=container.id)) for entry in part.entries]
    assert b"".join(lines).strip() == b"hiss", lines
    second = lifecycle.CreateContainer(life.CreateContainerRequest(
        sandbox_id=sandbox.id, config=life.ContainerConfig(
            name="second", image=image, command=["sleep", "1000"]))).container
    lifecycle.StartContainer(life.StartContainerRequest(container_id=second.id))
    requests = queue.Queue()
    requests.put(life.ExecRequest(start=life.ExecStart(container_id=second.id, command=["cat"], stdin=True)))
    requests.put(life.ExecRequest(stdin=b"to and fro\n"))
    requests.put(life.ExecRequest(close_stdin=life.CloseStdin()))
    requests.put(None)
    output, code = b"", None
    for answer in lifecycle.Exec(iter(requests.get, None)):
        output += answer.stdout
        if answer.HasField("exit"):
            code = answer.exit.code
    assert (output, code) == (b"to and fro\n", 0), (output, code)
    events = event_pb2_grpc.EventServiceStub(channel).Watch(
        event_pb2.WatchRequest(cursor=event_pb2.Cursor(), past_only=True))
    kinds = [response.event.kind for response in events if response.HasField("event")]
    assert event_pb2.EVENT_KIND_CONTAINER_EXITED in kinds, kinds
    lifecycle.RemoveSandbox(life.RemoveSandboxRequest(sandbox_id=sandbox.id, force=True))
    differences = list(node_pb2_grpc.NodeServiceStub(channel).Fsck(node_pb2.FsckRequest()))
    assert not differences, differences


through_cri()
through_ours()
print("done")
