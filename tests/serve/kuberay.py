"""The fields of KubeRay's RayCluster and RayService, strictly: a misspelt one is an error.

Written down from KubeRay's API reference (ray.io/v1: docs/reference/api.md of its repository, and
for authOptions the release notes of 1.5.1); only what our manifests might use. KubeRay's own CRD is
in no package that can be installed. Pod templates are Kubernetes' own, and are checked against
Kubernetes' schema (package kubernetes-validate).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Knows its fields, and converts nothing: "2" is no number, and 2 no text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AuthOptions(Strict):
    """See KubeRay."""

    mode: Literal["token", "disabled"]


class AutoscalerOptions(Strict):
    """See KubeRay."""

    idleTimeoutSeconds: int | None = None  # noqa: N815
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
    replicas: int = Field(0, ge=0)
    minReplicas: int = Field(ge=0)  # noqa: N815
    maxReplicas: int = Field(ge=0)  # noqa: N815
    numOfHosts: int = Field(1, ge=1)  # noqa: N815


class RayClusterSpec(Strict):
    """See KubeRay."""

    headGroupSpec: HeadGroup  # noqa: N815
    workerGroupSpecs: list[WorkerGroup] = []  # noqa: N815
    rayVersion: str | None = None  # noqa: N815
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
