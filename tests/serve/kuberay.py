"""The fields of KubeRay's RayCluster and RayService, strictly: a misspelt one is an error.

Only what our manifests might use. Compared by eye with the CRDs that KubeRay's Helm chart installs,
ray.io_rayclusters.yaml and ray.io_rayservices.yaml (version v1) in
helm-chart/kuberay-operator/crds/ of github.com/ray-project/kuberay at commit
02a80a6f2abf691f2f4e89e4b7c47672bc259b5c, which is later than 1.6. Those of 1.5.1, the oldest that
our manifests name, were not at hand. Pod templates are Kubernetes' own, and are checked against
Kubernetes' schema (package kubernetes-validate).

Stricter than the CRDs, which have no minimum for a count and no list of service types, and need
neither metadata.name, authOptions.mode nor serveConfigV2. Of what the operator refuses beyond them
(ray-operator/controllers/ray/utils/validation.go) only negative counts are here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

INT32_MAX = 2**31 - 1

Count = Annotated[int, Field(ge=0, le=INT32_MAX)]
"""The CRDs' int32, as far as it makes sense."""


class Strict(BaseModel):
    """Knows its fields, and converts nothing: "2" is no number, and 2 no text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Strict):
    """See KubeRay."""

    mode: Literal["token", "disabled"]


class AutoscalerOptions(Strict):
    """See KubeRay."""

    idleTimeoutSeconds: Count | None = None  # noqa: N815
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] | None = None  # noqa: N815
    version: Literal["v1", "v2"] | None = None


class HeadGroup(Strict):
    """See KubeRay."""

    template: dict[str, Any]
    rayStartParams: dict[str, str] = {}  # noqa: N815
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"] | None = None  # noqa: N815
    enableIngress: bool | None = None  # noqa: N815


class WorkerGroup(Strict):
    """See KubeRay."""

    groupName: str  # noqa: N815
    template: dict[str, Any]
    rayStartParams: dict[str, str] = {}  # noqa: N815
    replicas: Count = 0
    minReplicas: Count  # noqa: N815
    maxReplicas: Count  # noqa: N815
    numOfHosts: int = Field(1, ge=1, le=INT32_MAX)  # noqa: N815


class RayClusterSpec(Strict):
    """See KubeRay."""

    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup] = []  # noqa: N815
    rayVersion: str  # noqa: N815
    authOptions: AuthOptions | None = None  # noqa: N815
    enableInTreeAutoscaling: bool | None = None  # noqa: N815
    autoscalerOptions: AutoscalerOptions | None = None  # noqa: N815
    suspend: bool | None = None


class RayServiceSpec(Strict):
    """See KubeRay."""

    rayClusterConfig: RayClusterSpec  # noqa: N815
    serveConfigV2: str  # noqa: N815
    excludeHeadPodFromServeSvc: bool | None = None  # noqa: N815


class Metadata(Strict):
    """Kubernetes' ObjectMeta, as far as a user writes it."""

    name: str
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class RayCluster(Strict):
    """The whole manifest."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: RayClusterSpec


class RayService(Strict):
    """The whole manifest."""

    apiVersion: Literal["ray.io/v1"]  # noqa: N815
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec
