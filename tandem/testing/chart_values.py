"""The chart's own values, as models from which `helm/tandem/values.schema.json` is generated.

Settings of processes are not repeated here: `tandem.testing.chart_schema` takes them from `tandem.config`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Map = dict[str, Any]
Maps = list[Map]
Texts = dict[str, str]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,28}[a-z0-9])?$")]
Count = Annotated[int, Field(ge=1)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
Port = Annotated[int, Field(ge=1024, le=65535)]
Seconds = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]


class Values(BaseModel):
    """A map of values: unknown keys are errors, names are written in camel case."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True)


class Image(Values):
    """A container image."""

    repository: str = Field("", description="registry and name")
    tag: str = Field("", description="tag; empty takes the chart's appVersion")
    digest: Digest = Field("", description="sha256:... of the image; counts before the tag")
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field("IfNotPresent", description="when it is pulled")


class Images(Values):
    """The three images of `deploy/images`."""

    router: Image = Field(description="routers, and the pod of `helm test`")
    cpu: Image = Field(description="workers without GPUs")
    cuda: Image = Field(description="workers with GPUs")
    pull_secrets: Maps = Field(description="imagePullSecrets of every pod, such as `- name: registry`")


class ModelClaim(Values):
    """A model on a PersistentVolumeClaim."""

    claim_name: str = Field("", description="name of the claim; many pods mount it, read only")
    path: str = Field("", description="folder of the model on it; empty is the volume's root")


class ModelImage(Values):
    """A model in an OCI image or artefact, mounted as an image volume."""

    reference: str = Field("", description="image, best with a digest; the cluster needs the feature gate ImageVolume")
    pull_policy: Literal["IfNotPresent", "Always", "Never"] = Field("IfNotPresent", description="when it is pulled")
    path: str = Field("", description="folder of the model in it; empty is the image's root")


class ModelHub(Values):
    """A model from the Hugging Face hub."""

    id: str = Field("", description="the model's id, such as Qwen/Qwen3-8B")
    existing_secret: str = Field("", description="Secret with an access token; empty for open models")
    secret_key: str = Field("token", description="key of the access token in it")
    endpoint: str = Field("", description="HF_ENDPOINT, for a mirror")
    cache_claim: str = Field(
        "", description="PersistentVolumeClaim (ReadWriteMany) that keeps downloads; empty: each pod downloads its own"
    )


class Model(Values):
    """What is served: exactly one of demo, pvc, image, hub."""

    demo: bool = Field(description="the small model that the images ship")
    pvc: ModelClaim = Field(description="from a PersistentVolumeClaim")
    image: ModelImage = Field(description="from an image volume")
    hub: ModelHub = Field(description="from the Hugging Face hub")
    served_name: str = Field(description="name clients use; empty: the last part of the model's path")


class Discovery(Values):
    """How routers learn of workers."""

    mode: Literal["kubernetes", "registration"] = Field(
        description="kubernetes: routers watch the pods; registration: workers announce themselves at every router"
    )


class Secrets(Values):
    """The cluster's token, the metrics' token and the API keys."""

    existing_secret: str = Field(description="Secret with the keys named below; empty: one is generated and kept")
    token_key: str = Field(description="key of the token that all processes share, 16 characters or more")
    metrics_token_key: str = Field(description="key of the token that Prometheus shows, 16 characters or more")
    api_keys_key: str = Field(description="key of the tenants' file, docs/operations.md")
    client_key_key: str = Field(description="key of one API key in clear, for `helm test`; only that needs it")


class Tls(Values):
    """Mutual TLS between the processes."""

    existing_secret: str = Field(description="Secret with tls.crt, tls.key and ca.crt, as cert-manager writes it")
    name: str = Field(description="name in the certificates: pods are called at their addresses, which have none")


class Probes(Values):
    """How long each state may last. The probes' paths are fixed."""

    startup_seconds: Count | None = Field(None, description="time to load; after it the container is restarted")
    liveness_seconds: Count | None = Field(None, description="silence after which the container is restarted")


class Budget(Values):
    """A PodDisruptionBudget."""

    enabled: bool = Field(True, description="whether there is one")
    max_unavailable: Count | str = Field(1, description="pods that a node's drain may take at once, or a percentage")


class Keda(Values):
    """A KEDA ScaledObject's own part."""

    server_address: str = Field("", description="URL of Prometheus")
    authentication_ref: str = Field("", description="name of a TriggerAuthentication, where Prometheus asks for one")
    polling_interval: Count = Field(15, description="seconds between queries")


class Autoscaling(Values):
    """Replicas by Tandem's own metrics."""

    kind: Literal["none", "hpa", "keda"] = Field("none", description="who scales")
    min_replicas: Count = Field(1, description="fewest workers")
    max_replicas: Count = Field(4, description="most workers")
    queued_tokens: Annotated[int, Field(ge=0)] = Field(
        16384, description="queued tokens for each worker, above which more are started; 0 ignores them"
    )
    page_use: Annotated[float, Field(ge=0, le=1)] = Field(
        0.85, description="share of KV pages in use, above which more are started; 0 ignores it"
    )
    scale_down_seconds: Annotated[Seconds, Field(le=3600)] = Field(
        600, description="time that fewer must have been enough, an hour at most"
    )
    keda: Keda = Field(Keda(), description="where KEDA asks")


class Rdma(Values):
    """A network that workers write KV over."""

    enabled: bool = Field(False, description="asks for the device and locked memory")
    resource: str = Field("rdma/hca_shared_devices_a", description="what the node's device plugin calls it")
    count: Count = Field(1, description="how many of it for each worker")
    ucx_tls: str = Field("rc,ud,tcp,self,sm", description="UCX_TLS; with GPUs the chart adds cuda_copy,cuda_ipc")
    ucx_net_devices: str = Field("", description="UCX_NET_DEVICES, such as mlx5_0:1; empty: UCX chooses")
    nccl_ib_hca: str = Field("", description="NCCL_IB_HCA; empty: NCCL chooses")
    nccl_socket_ifname: str = Field("", description="NCCL_SOCKET_IFNAME; empty: NCCL chooses")
    networks: str = Field("", description="annotation k8s.v1.cni.cncf.io/networks, for Multus")


class PodValues(Values):
    """What routers' and workers' pods both have."""

    replicas: Count | None = Field(None, description="how many pods; not counted where something scales them")
    resources: Map | None = Field(None, description="requests and limits of the container")
    node_selector: Texts | None = Field(None, description="labels that nodes must have")
    tolerations: Maps | None = Field(None, description="taints of nodes that are borne")
    affinity: Map | None = Field(None, description="pod and node affinity")
    topology_spread_constraints: Maps | None = Field(
        None, description="how pods are spread; the chart adds the labelSelector where there is none"
    )
    priority_class_name: str | None = Field(None, description="PriorityClass of the pods")
    pod_annotations: Texts | None = Field(None, description="more annotations")
    pod_labels: Texts | None = Field(None, description="more labels")
    extra_env: Maps | None = Field(None, description="more environment: settings as TANDEM_..., or libraries' own")
    extra_args: list[str] | None = Field(None, description="more flags, after the chart's own")
    extra_volumes: Maps | None = Field(None, description="more volumes")
    extra_volume_mounts: Maps | None = Field(None, description="where they are mounted")
    pre_stop_seconds: Seconds | None = Field(
        None, description="wait before SIGTERM, while others learn that the pod goes"
    )
    probes: Probes | None = Field(None, description="limits of the probes")
    disruption_budget: Budget | None = Field(None, description="PodDisruptionBudget")
    cache_size: Quantity | None = Field(None, description="limit of the emptyDir for downloads and compiled kernels")


class Router(PodValues):
    """The routers."""

    settings: Map = Field(description="settings of `tandem router`")
    bind: Literal["0.0.0.0", "::"] = Field(description="address that the ports listen on; :: for IPv6")
    service: Service = Field(description="where clients reach them")


class Service(Values):
    """The routers' Service."""

    type: Literal["ClusterIP", "NodePort", "LoadBalancer"] = Field(description="kind of Service")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(description="its port")
    annotations: Texts = Field(description="annotations, such as a load balancer's")


class WorkerPod(PodValues):
    """A pool's pods. What a pool leaves out it takes from `workers`."""

    workload: Literal["Deployment", "LeaderWorkerSet"] | None = Field(
        None, description="LeaderWorkerSet needs its controller (leaderworkerset.x-k8s.io/v1)"
    )
    hosts_per_worker: Count | None = Field(None, description="hosts of one worker; more than 1 cannot be served yet")
    gpus: Annotated[int, Field(ge=0)] | None = Field(
        None, description="GPUs of one worker: 0 computes on the CPU; more than 1 cannot be used yet"
    )
    gpu_resource: str | None = Field(None, description="what the node's device plugin calls a GPU")
    image: Image | None = Field(None, description="another image than images.cpu or images.cuda")
    runtime_class_name: str | None = Field(None, description="RuntimeClass of the pods, such as nvidia")
    shm_size: Quantity | None = Field(None, description="limit of the memory-backed /dev/shm")
    rdma: Rdma | None = Field(None, description="the network for KV")
    autoscaling: Autoscaling | None = Field(None, description="who changes the number of replicas")


class Workers(WorkerPod):
    """Defaults of every pool."""

    settings: Map = Field(description="settings that `tandem prefill` and `tandem decode` share")


class Pool(WorkerPod):
    """One pool of equal workers."""

    name: Name = Field(description="part of the objects' names")
    role: Literal["prefill", "decode"] = Field(description="what its workers do")
    settings: Map | None = Field(None, description="settings of `tandem prefill` or `tandem decode`")


class NetworkPolicy(Values):
    """Who reaches which port."""

    enabled: bool = Field(description="whether there are policies; the cluster's network must enforce them")
    clients: Maps = Field(description="peers (NetworkPolicyPeer) that reach the routers' HTTP port; empty: everybody")
    monitoring: Maps = Field(description="peers that reach the workers' metrics ports")


class Monitor(Values):
    """ServiceMonitors for the Prometheus operator."""

    enabled: bool = Field(description="whether there are any")
    interval: Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m)$")] = Field(description="between scrapes")
    labels: Texts = Field(description="labels that the operator selects by, such as release: prometheus")
    rules: bool = Field(description="whether the recording and alert rules come along, as PrometheusRules")


class Dashboards(Values):
    """ConfigMaps for Grafana's sidecar."""

    enabled: bool = Field(description="whether there are any")
    label: str = Field(description="label that the sidecar looks for")
    value: str = Field(description="its value")
    annotations: Texts = Field(description="annotations, such as the folder's")


class EndpointPicker(Values):
    """The Service of an endpoint picker."""

    name: str = Field(description="name of the Service")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(description="its gRPC port")
    failure_mode: Literal["FailOpen", "FailClose"] = Field(description="what the gateway does without it")


class InferencePool(Values):
    """An InferencePool (inference.networking.k8s.io/v1) of routers."""

    enabled: bool = Field(description="whether there is one; the HTTPRoute then leads to it")
    endpoint_picker: EndpointPicker = Field(description="who chooses among the routers")


class Gateway(Values):
    """An HTTPRoute, and what it leads to."""

    enabled: bool = Field(description="whether there is an HTTPRoute")
    parent_refs: Maps = Field(description="gateways that it belongs to")
    hostnames: list[str] = Field(description="host names; empty: all of the gateway's")
    request_timeout: Annotated[str, Field(pattern=r"^[0-9]+(h|m|s|ms)$")] = Field(description="of a whole answer")
    inference_pool: InferencePool = Field(description="for gateways that speak with an endpoint picker")


class ServiceAccounts(Values):
    """Who the pods are to Kubernetes."""

    create: bool = Field(description="whether the routers' ServiceAccount is made")
    name: str = Field(description="its name; empty: the routers' own name, or `default` where none is made")
    annotations: Texts = Field(description="annotations, such as a cloud's identity")


class Security(Values):
    """Who the processes are in their containers. Everything else is fixed: nothing is root, nothing is writable."""

    run_as_user: Count = Field(description="user of every container")
    run_as_group: Count = Field(description="group of every container, and of what it mounts")


class TandemValues(Values):
    """Values of the chart."""

    name_override: str = Field(description="name in place of the chart's")
    fullname_override: str = Field(description="name in place of release and chart")
    cluster_key: str = Field(description="part of every block hash; another one means another cache")
    images: Images = Field(description="where the images are")
    model: Model = Field(description="what is served")
    discovery: Discovery = Field(description="how routers learn of workers")
    secrets: Secrets = Field(description="tokens and API keys")
    tls: Tls = Field(description="mutual TLS between the processes")
    router: Router = Field(description="the routers")
    workers: Workers = Field(description="defaults of every pool")
    pools: Annotated[list[Pool], Field(min_length=1)] = Field(description="the pools; one must decode")
    ports: Ports = Field(description="ports in the pods")
    network_policy: NetworkPolicy = Field(description="who reaches which port")
    service_monitor: Monitor = Field(description="scraping by the Prometheus operator")
    dashboards: Dashboards = Field(description="dashboards for Grafana")
    gateway: Gateway = Field(description="Gateway API")
    service_account: ServiceAccounts = Field(description="who the routers are to Kubernetes")
    security: Security = Field(description="user and group of the processes")


class Ports(Values):
    """Ports in the pods."""

    http: Port = Field(description="routers: clients")
    control: Port = Field(description="routers: workers that register")
    worker: Port = Field(description="workers: gRPC")
    metrics: Port = Field(description="workers: metrics and probes")
