"""What the image, the compose file and the manifests promise, as far as can be seen without an engine."""

import re
import tomllib
from importlib.metadata import requires
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from oncewise.settings import Settings, variable_of
from tests.docs.reference import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()
STAGES = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
BUILD, IMAGE = STAGES
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
FOLDER = ROOT / "deploy" / "kubernetes"
GRACE_S = 8  # what the supervisor gives workers beyond the drain


def locked(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)(?:\[[a-z,-]+\])?==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


def manifests() -> dict[str, dict[str, Any]]:
    names = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"]
    documents = [yaml.safe_load((FOLDER / name).read_text()) for name in names]
    return {document["kind"]: document for document in documents}


# -- the image -----------------------------------------------------------------------------------------------------


def test_what_the_image_installs_is_what_was_tested() -> None:
    """The lock of the image is a part of the lock of the tests, with hashes and without addresses."""
    image, tested = locked("deploy/requirements.lock"), locked("requirements.lock")
    assert {name: version for name, version in image.items() if tested.get(name) != version} == {}
    text = (ROOT / "deploy/requirements.lock").read_text()
    assert "://" not in text
    assert all("--hash=sha256:" in package for package in re.split(r"\n(?=[a-z])", text))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["cluster"]]
    assert {Requirement(entry).name.lower() for entry in declared} - image.keys() == set()
    assert not {"pytest", "ruff", "hatchling", "playwright", "uv"} & image.keys()


def test_the_image_is_built_from_locked_tools_only() -> None:
    """Every install checks hashes, or takes nothing from an index; the tools are hatchling and all that it needs."""
    installs = re.findall(r"pip (?:install|wheel) [^\n\\&]+", DOCKERFILE)
    assert len(installs) == 4
    assert all("--require-hashes" in line or "--no-index" in line for line in installs)
    tools = set(re.findall(r"/\^\(([^)]+)\)", BUILD)[0].split("|"))
    needed, todo = set(), ["hatchling"]
    while todo:
        needed.add(name := todo.pop())
        own = [Requirement(entry) for entry in requires(name) or ()]
        todo += [entry.name for entry in own if not (entry.marker and not entry.marker.evaluate({"extra": ""}))]
    assert tools == needed


def test_the_image_runs_as_a_user_who_is_not_root_and_has_no_build_tools() -> None:
    """By number; nothing after that changes it back, and pip is gone."""
    assert re.findall(r"^USER (.+)$", IMAGE, re.MULTILINE) == ["10001:10001"]
    assert "--uid 10001" in IMAGE
    assert "COPY --from=build /opt/oncewise /opt/oncewise" in IMAGE
    assert "pip uninstall --yes pip" in BUILD
    assert "pip install" not in IMAGE


def test_the_image_has_certificates_byte_code_and_a_health_check() -> None:
    """Calls to providers are verified; a start compiles nothing; who waits for the container waits for readiness."""
    assert "ca-certificates" in IMAGE
    assert "compileall" in BUILD
    (check,) = re.findall(r"HEALTHCHECK[^\n]*\\\n\s+CMD (\[.+\])", IMAGE)
    program = yaml.safe_load(check)
    assert program[:2] == ["python", "-c"]
    assert "/health/readiness" in program[2]
    compile(program[2], "healthcheck", "exec")
    assert "STOPSIGNAL SIGTERM" in IMAGE
    assert 'ENTRYPOINT ["oncewise"]' in IMAGE


def test_nothing_but_what_it_is_built_from_reaches_the_build() -> None:
    """No database, key file or history of this directory."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    copied = set(" ".join(re.findall(r"^COPY ([^-].*) \S+$", BUILD, re.MULTILINE)).split())
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_the_settings_of_the_image_exist() -> None:
    """A name that is misspelt would only be a warning at the start."""
    assert set(re.findall(r"(ONCEWISE_\w+)=", IMAGE)) <= KNOWN


KNOWN = {variable_of((name,)) for name in Settings.model_fields}
PROVIDERS = re.compile(r"[A-Z]+_(API_KEY|BASE_URL|RPS|BURST|CONCURRENCY)")


def unknown(names: set[str]) -> set[str]:
    return {name for name in names if name not in KNOWN and not PROVIDERS.fullmatch(name)}


# -- compose -------------------------------------------------------------------------------------------------------


def test_compose_has_two_servers_a_balancer_and_what_they_share() -> None:
    """Nobody but the balancer has a port outside, and that one on loopback."""
    services = COMPOSE["services"]
    assert set(services) == {"balancer", "server-1", "server-2", "setup", "postgres", "valkey"}
    assert [name for name, service in services.items() if "ports" in service] == ["balancer"]
    assert services["balancer"]["ports"][0].startswith("127.0.0.1:")
    assert services["server-1"] == services["server-2"]
    assert unknown(set(services["server-1"]["environment"])) == set()


def test_composed_servers_wait_for_what_they_need_and_are_given_time_to_end() -> None:
    """In this order: storage and Valkey, the schema and the first key, servers, balancer."""
    services = COMPOSE["services"]
    assert set(services["setup"]["depends_on"]) == {"postgres", "valkey"}
    assert services["server-1"]["depends_on"] == {"setup": {"condition": "service_completed_successfully"}}
    conditions = [need["condition"] for need in services["balancer"]["depends_on"].values()]
    assert conditions == ["service_healthy"] * 2
    for name in ("postgres", "valkey"):
        assert services[name]["healthcheck"]["test"]
    grace_s = int(services["server-1"]["stop_grace_period"].removesuffix("s"))
    assert grace_s > Settings.model_fields["drain_s"].default + GRACE_S


def test_a_composed_server_has_every_setting_of_the_file_but_its_own_place() -> None:
    """A key for Gemini, say, reaches it; the port in the file is the one outside."""
    for name in ("server-1", "setup"):
        service = COMPOSE["services"][name]
        assert service["env_file"] == [{"path": ".env", "required": False}]
        given = service["environment"]
        assert (given["ONCEWISE_HOST"], given["ONCEWISE_PORT"]) == ("0.0.0.0", 8000)
        assert {"ONCEWISE_DATABASE_URL", "ONCEWISE_REDIS_URL"} <= given.keys()


def test_the_schema_is_not_made_while_postgres_makes_its_database() -> None:
    """Its image starts a server on a socket alone for that, which a look at the socket would take for ready."""
    test = COMPOSE["services"]["postgres"]["healthcheck"]["test"]
    assert test[test.index("--host") + 1] == "127.0.0.1"


def test_composed_servers_may_do_no_more_than_they_must() -> None:
    """A root file system that is read only, no capabilities; no password in the file."""
    for name in ("server-1", "setup"):
        service = COMPOSE["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
    assert re.findall(r"PASSWORD: (?!\$\{)", (ROOT / "compose.yaml").read_text()) == []


def test_the_balancer_knows_both_servers_and_does_not_hold_streams_back() -> None:
    """What any balancer must do; the file marks it."""
    text = (ROOT / "deploy/nginx.conf").read_text()
    for name in ("server-1", "server-2"):
        # Asked for again and again: a container that is made anew may have another address.
        assert re.search(rf"server {name}:8000 resolve ", text)
    assert re.search(r"resolver 127\.0\.0\.11 ", text)
    assert "proxy_buffering off;" in text
    assert "gzip off;" in text
    read_s = int(re.findall(r"proxy_read_timeout (\d+)s", text)[0])
    assert read_s > 120
    assert text.count("{") == text.count("}")
    (messages,) = re.findall(r"location ~ (\S+) \{\n\s+proxy_next_upstream [^;]*non_idempotent", text)
    for path in ("/api/threads/x/messages", "/api/threads/x/messages/stream", "/v1/chat/completions"):
        assert re.search(messages, path)
    assert not re.search(messages, "/api/threads/")


# -- Kubernetes ----------------------------------------------------------------------------------------------------


@pytest.fixture(name="pod")
def _pod() -> dict[str, Any]:
    spec: dict[str, Any] = manifests()["Deployment"]["spec"]["template"]["spec"]
    return spec


def test_every_manifest_is_part_of_the_kustomization() -> None:
    """But the example of the secret, which is filled in elsewhere."""
    named = set(yaml.safe_load((FOLDER / "kustomization.yaml").read_text())["resources"])
    assert {path.name for path in FOLDER.iterdir()} - named == {"kustomization.yaml", "secret.example.yaml"}
    kinds = set(manifests())
    assert {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "Job", "ConfigMap"} <= kinds


def test_a_pod_is_probed_for_the_right_thing(pod: dict[str, Any]) -> None:
    """Readiness asks for readiness; liveness does not: a restart mends no database."""
    (server,) = pod["containers"]
    assert server["readinessProbe"]["httpGet"]["path"] == "/health/readiness"
    assert server["livenessProbe"]["httpGet"]["path"] == "/health"
    assert server["startupProbe"]["httpGet"]["path"] == "/health"
    assert server["args"] == ["serve"]


def test_a_pod_has_time_to_drain_before_it_is_killed(pod: dict[str, Any]) -> None:
    """The pause before the signal, the drain, and what closing takes."""
    (server,) = pod["containers"]
    pause_s = int(server["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_s = int(manifests()["ConfigMap"]["data"]["ONCEWISE_DRAIN_S"])
    readiness_s = server["readinessProbe"]["periodSeconds"] * server["readinessProbe"]["failureThreshold"]
    assert pause_s >= readiness_s
    assert pod["terminationGracePeriodSeconds"] >= pause_s + drain_s + GRACE_S


def test_pods_are_not_all_taken_at_once() -> None:
    """Neither by an update nor by an empty node; the budget and the service mean the servers and not the job."""
    found = manifests()
    assert found["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    # A number of replicas would undo what the autoscaler decided whenever the manifest is applied again.
    assert "replicas" not in found["Deployment"]["spec"]
    assert found["HorizontalPodAutoscaler"]["spec"]["minReplicas"] == 2
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    server = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == server
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == server
    assert found["Service"]["spec"]["selector"] == server
    assert found["Job"]["spec"]["template"]["metadata"]["labels"] != server


@pytest.mark.parametrize("kind", ["Deployment", "Job"])
def test_a_pod_is_restricted(kind: str) -> None:
    """As the namespace asks for: not root, no capabilities, nothing writable but /tmp, no token of the cluster."""
    found = manifests()
    assert found["Namespace"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    pod = found[kind]["spec"]["template"]["spec"]
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["automountServiceAccountToken"] is False
    # A service of this name gives each pod of its namespace an ONCEWISE_PORT that is no number.
    assert found["Service"]["metadata"]["name"] == "oncewise"
    assert pod["enableServiceLinks"] is False
    for container in (*pod.get("initContainers", ()), *pod["containers"]):
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False
        assert security["readOnlyRootFilesystem"] is True
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == ["/tmp"]
        assert container["resources"]["limits"]["memory"]


def test_servers_wait_for_the_schema_of_their_version(pod: dict[str, Any]) -> None:
    """Applied together with the job that makes it; `db current --check` ends with 0 when it is there."""
    (first,) = pod["initContainers"]
    assert first["command"] == ["sh", "-c"]
    assert first["args"] == ["until oncewise db current --check; do sleep 2; done"]
    assert first["envFrom"] == pod["containers"][0]["envFrom"]


def test_the_settings_in_the_manifests_exist() -> None:
    """In the secret too; what is secret is in no other file."""
    secret = yaml.safe_load((FOLDER / "secret.example.yaml").read_text())["stringData"]
    assert unknown(set(secret) | set(manifests()["ConfigMap"]["data"])) == set()
    others = "".join(path.read_text() for path in FOLDER.iterdir() if path.name != "secret.example.yaml")
    assert "PASSWORD" not in others
    assert not re.search(r"_API_KEY|DATABASE_URL|REDIS_URL", others)
