"""What stands in deploy/ asks for metrics that the server has, and names of the image that the image has."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import yaml

from dsd_serve.shell.bulk import output_of
from dsd_serve.shell.generate_command import arguments_parser as generate_arguments
from dsd_serve.shell.sample_set import Shard
from server.settings import Settings
from tests.support.data import ROOT

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"


def load(name):
    return yaml.safe_load((KUBERNETES / name).read_text())


def test_every_metric_of_alerts_and_autoscaler_exists(server_url):
    served = httpx.get(f"{server_url}/metrics").text
    known = set(re.findall(r"^(dsd_\w+?)[ {]", served, re.MULTILINE))
    asked = set()
    for file in [*DEPLOY.glob("*.yml"), *KUBERNETES.glob("*.yaml")]:
        asked |= set(re.findall(r"\b(dsd_[a-z_]+)", file.read_text()))
    assert asked >= {"dsd_ready", "dsd_images_waiting", "dsd_queue_duration_seconds_bucket"}
    assert asked - known == set()


def test_the_manifests_belong_together():
    pod = load("deployment.yaml")["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert load("deployment.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load("service.yaml")["spec"]["selector"] == labels
    assert load("disruption.yaml")["spec"]["selector"]["matchLabels"] == labels
    assert load("autoscaler.yaml")["spec"]["scaleTargetRef"]["name"] == load("deployment.yaml")["metadata"]["name"]
    container = pod["spec"]["containers"][0]
    for variable in container["env"]:
        assert variable["name"].removeprefix("DSD_").lower() in Settings.__dataclass_fields__
    # What the pod may take to end is more than preStop and the grace of the server.
    assert pod["spec"]["terminationGracePeriodSeconds"] > Settings().grace + 5
    # A service named dsd would otherwise put its own DSD_PORT into the pods of its namespace.
    assert pod["spec"]["enableServiceLinks"] is False
    named = set(load("kustomization.yaml")["resources"]) | {"kustomization.yaml", "adapter-values.yaml"}
    assert named == {file.name for file in KUBERNETES.iterdir()}


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_the_gpu_overlay_is_the_deployment_with_a_gpu():
    command = ["kubectl", "kustomize", str(DEPLOY / "kubernetes-gpu")]
    rendered = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = {part["kind"]: part for part in yaml.safe_load_all(rendered)}
    assert set(parts) >= {"Deployment", "Service", "HorizontalPodAutoscaler", "NetworkPolicy"}
    spec = parts["Deployment"]["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}, "there is no spare GPU"
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    assert (limits["memory"], limits["cpu"], limits["nvidia.com/gpu"]) == ("8Gi", "4", 1)
    assert container["image"] == "dsd:gpu"
    assert {variable["name"] for variable in container["env"]} == {"DSD_LOG_FORMAT", "DSD_THREADS", "XDG_CACHE_HOME"}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert any(item["key"] == "nvidia.com/gpu" for item in pod["tolerations"])


def test_the_compose_files_mount_what_is_there_and_let_the_server_drain():
    for name in ("compose.yaml", "compose.triton.yaml", "compose.monitoring.yaml"):
        for service in yaml.safe_load((ROOT / name).read_text())["services"].values():
            for volume in service.get("volumes", []):
                source = re.sub(r"^\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
                if source.startswith("./") and source != "./triton-repository":  # which dsd-export writes
                    assert (ROOT / source).exists(), volume
            if "dsd:cpu" in service.get("image", ""):
                assert int(service["stop_grace_period"].rstrip("s")) > Settings().grace


COMPOSE = sorted(ROOT.glob("compose*.yaml"))


SERVICES = [
    pytest.param(service, id=f"{path.stem}-{name}")
    for path in COMPOSE
    for name, service in yaml.safe_load(path.read_text())["services"].items()
]


@pytest.mark.parametrize("service", SERVICES)
def test_a_compose_service_has_no_rights_that_it_does_not_need(service):
    assert service["read_only"] is True and service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"] and "cap_add" not in service and not service.get("privileged")
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"(\$\{\w+:-)?\d+[mg]\}?", service["mem_limit"]) and service["pids_limit"] > 0
    assert not service.get("network_mode") and not service.get("pid")
    for port in service.get("ports", []):
        assert re.match(r"(127\.0\.0\.1|\$\{BIND:-127\.0\.0\.1\}):", port), (
            f"{port} is open to other machines by default"
        )
    for volume in service.get("volumes", []):
        assert "docker.sock" not in volume
        source = re.sub(r"^\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
        assert not source.startswith(("/", ".")) or volume.endswith(":ro"), volume


def test_no_image_of_compose_moves_and_no_password_is_known():
    for path in COMPOSE:
        for service in yaml.safe_load(path.read_text())["services"].values():
            assert service.get("build") or re.search(r":v?\d+\.\d+\.\d+$", service["image"]), service["image"]
            for name, value in service.get("environment", {}).items():
                if re.search("PASSWORD|SECRET|TOKEN|KEY", name):
                    assert re.fullmatch(r"\$\{\w+:\?.+\}", value), f"{name} must be asked for"
    grafana = yaml.safe_load((ROOT / "compose.monitoring.yaml").read_text())["services"]["grafana"]["environment"]
    assert "GF_SECURITY_ADMIN_PASSWORD" in grafana and grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "false"


def test_a_pod_has_no_rights_that_it_does_not_need():
    pod = load("deployment.yaml")["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False
    assert load("serviceaccount.yaml")["metadata"]["name"] == pod["serviceAccountName"] != "default"
    assert load("serviceaccount.yaml")["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True and context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod["containers"]:
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False and own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]} and not own.get("privileged")
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    for volume in pod["volumes"]:
        assert "hostPath" not in volume and ("emptyDir" not in volume or volume["emptyDir"]["sizeLimit"])


def test_the_network_policy_lets_the_port_in_and_nothing_out():
    policy = load("network.yaml")["spec"]
    pod = load("deployment.yaml")["spec"]["template"]
    assert policy["podSelector"]["matchLabels"] == pod["metadata"]["labels"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"} and policy["egress"] == []
    ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
    for rule in policy["ingress"]:
        assert rule["from"] and {port["port"] for port in rule["ports"]} <= ports
    assert load("namespace.yaml")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def accepted(command):
    """The options of a dsd-generate command."""
    words = shlex.split(command)
    assert words[:2] == ["exec", "dsd-generate"]
    options = generate_arguments().parse_args(words[2:])
    Shard.parse(options.shard)
    output_of(options.output, Shard(), options.per_tar or 1000)
    return options


def test_the_kubernetes_job_draws_every_shard_once():
    job = yaml.safe_load((DEPLOY / "kubernetes-job.yaml").read_text())["spec"]
    assert (job["completionMode"], job["completions"]) == ("Indexed", 8)
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["sh", "-c"]
    (script,) = container["args"]
    shards = []
    for index in range(8):
        echo = ["sh", "-c", f"echo {script.removeprefix('exec ')}"]
        said = subprocess.run(echo, env={"JOB_COMPLETION_INDEX": str(index)}, capture_output=True, text=True)
        options = accepted(f"exec {said.stdout}")
        shards.append(options.shard)
        assert Path(options.output).parent == Path(container["volumeMounts"][0]["mountPath"])
    assert shards == [f"{number}/8" for number in range(1, 9)]
    own = container["securityContext"]
    assert own["readOnlyRootFilesystem"] is True and own["capabilities"] == {"drop": ["ALL"]}


def test_the_slurm_array_draws_every_shard_once(tmp_path):
    script = DEPLOY / "slurm-array.sh"
    subprocess.run(["sh", "-n", script], check=True)
    assert "#SBATCH --array=1-8\n" in script.read_text()
    (tmp_path / "dsd-generate").write_text('#!/bin/sh\necho exec dsd-generate "$@"\n')
    (tmp_path / "dsd-generate").chmod(0o755)
    for number in (1, 8):
        environment = {"SLURM_ARRAY_TASK_ID": str(number), "SLURM_CPUS_PER_TASK": "4", "MODEL": "/m"}
        environment["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
        said = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, check=True)
        assert accepted(said.stdout).shard == f"{number}/8"


@pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed: apt-get install prometheus")
def test_prometheus_reads_the_server_with_this_configuration(server_url, tmp_path):
    """The real one; its targets are found by name in compose, and given by address here."""
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    config["global"]["scrape_interval"] = "1s"
    (job,) = [job for job in config["scrape_configs"] if job["job_name"] == "dsd"]
    del job["dns_sd_configs"]
    job["static_configs"] = [{"targets": [server_url.removeprefix("http://")]}]
    config["scrape_configs"] = [job]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(DEPLOY / "alerts.yml", tmp_path)
    arguments = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(["prometheus", *arguments, "--web.listen-address=127.0.0.1:0"], stderr=log)
    try:
        deadline = time.monotonic() + 30
        while not (found := re.search(r"Listening on.*?address=\S*?:(\d+)", (tmp_path / "log").read_text())):
            assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        api = f"http://127.0.0.1:{found[1]}/api/v1"
        httpx.get(f"{server_url}/generate?class=207&steps=2").raise_for_status()

        def value(query):
            result = httpx.get(f"{api}/query", params={"query": query}).json()["data"]["result"]
            return float(result[0]["value"][1]) if result else None

        slowest = "histogram_quantile(0.95, sum by (le) (rate(dsd_tick_duration_seconds_bucket[30s])))"
        while value(slowest) is None:  # a rate takes two scrapes
            assert time.monotonic() < deadline
            time.sleep(0.3)
        assert value("sum(dsd_images_total)") >= 1
        assert value('dsd_ready{job="dsd"}') == 1
        rules = httpx.get(f"{api}/rules").json()["data"]["groups"][0]["rules"]
        assert len(rules) == 8 and not [json.dumps(rule) for rule in rules if rule["state"] == "firing"]
    finally:
        process.terminate()
        process.wait(20)
