package deploy

import (
	"maps"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/util/intstr"
	appsapply "k8s.io/client-go/applyconfigurations/apps/v1"
	coreapply "k8s.io/client-go/applyconfigurations/core/v1"
	metaapply "k8s.io/client-go/applyconfigurations/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

const (
	hbonePort     = 15008
	statsPort     = 15020
	readinessPort = 15021
	// user that the container runs as: it needs no capability and no file of its own.
	user = 1337
	// container is named as Istio names its proxies, which dashboards select by.
	container = "istio-proxy"

	rootConfigMap = "istio-ca-root-cert"
	tokenAudience = "istio-ca"
	tokenLifetime = 43200
	// gracePeriod is how long requests may go on after the pod was told to end; the process ends a little earlier.
	gracePeriod = 30
)

func (d *Deployer) labels(gw *gatewayv1.Gateway) map[string]string {
	l := map[string]string{}
	if gw.Spec.Infrastructure != nil {
		for k, v := range gw.Spec.Infrastructure.Labels {
			l[string(k)] = string(v)
		}
	}
	maps.Copy(l, map[string]string{
		managedLabel: managedController, gatewayLabel: gw.Name, classLabel: string(gw.Spec.GatewayClassName), managedByLabel: managedBy,
	})
	if d.cfg.Revision != "" {
		l["istio.io/rev"] = d.cfg.Revision
	}
	return l
}

func annotations(gw *gatewayv1.Gateway) map[string]string {
	a := map[string]string{}
	if gw.Spec.Infrastructure != nil {
		for k, v := range gw.Spec.Infrastructure.Annotations {
			a[string(k)] = string(v)
		}
	}
	return a
}

// owner makes the garbage collector remove what is left when the Gateway goes.
func owner(gw *gatewayv1.Gateway) *metaapply.OwnerReferenceApplyConfiguration {
	return metaapply.OwnerReference().WithAPIVersion(gatewayv1.GroupVersion.String()).WithKind("Gateway").
		WithName(gw.Name).WithUID(gw.UID)
}

func (d *Deployer) serviceAccount(gw *gatewayv1.Gateway) *coreapply.ServiceAccountApplyConfiguration {
	return coreapply.ServiceAccount(gw.Name, gw.Namespace).
		WithLabels(d.labels(gw)).WithAnnotations(annotations(gw)).WithOwnerReferences(owner(gw))
}

func (d *Deployer) service(gw *gatewayv1.Gateway) *coreapply.ServiceApplyConfiguration {
	port := func(name string, number int32) *coreapply.ServicePortApplyConfiguration {
		return coreapply.ServicePort().WithName(name).WithPort(number).WithTargetPort(intstr.FromInt32(number)).
			WithProtocol(corev1.ProtocolTCP).WithAppProtocol("tcp")
	}
	return coreapply.Service(gw.Name, gw.Namespace).
		WithLabels(d.labels(gw)).WithAnnotations(annotations(gw)).WithOwnerReferences(owner(gw)).
		WithSpec(coreapply.ServiceSpec().
			WithType(corev1.ServiceTypeClusterIP).
			WithIPFamilyPolicy(corev1.IPFamilyPolicyPreferDualStack).
			WithSelector(map[string]string{gatewayLabel: gw.Name}).
			WithPorts(port("status-port", readinessPort), port("mesh", hbonePort)))
}

func (d *Deployer) deployment(gw *gatewayv1.Gateway) *appsapply.DeploymentApplyConfiguration {
	podLabels := d.labels(gw)
	maps.Copy(podLabels, map[string]string{
		// The waypoint is part of the mesh by itself: its own connections are not to be captured.
		"istio.io/dataplane-mode":             "none",
		"sidecar.istio.io/inject":             "false",
		"service.istio.io/canonical-name":     gw.Name,
		"service.istio.io/canonical-revision": "latest",
		"service.istio.io/workload-name":      gw.Name,
	})
	podAnnotations := annotations(gw)
	maps.Copy(podAnnotations, map[string]string{
		"prometheus.io/scrape": "true", "prometheus.io/port": "15020", "prometheus.io/path": "/stats/prometheus",
	})
	pod := coreapply.PodSpec().
		WithServiceAccountName(gw.Name).
		WithTerminationGracePeriodSeconds(gracePeriod).
		WithSecurityContext(coreapply.PodSecurityContext().WithRunAsUser(user).WithRunAsGroup(user).WithFSGroup(user).WithRunAsNonRoot(true).
			WithSeccompProfile(coreapply.SeccompProfile().WithType(corev1.SeccompProfileTypeRuntimeDefault))).
		WithContainers(d.container(gw)).
		WithVolumes(
			coreapply.Volume().WithName("istiod-ca-cert").WithConfigMap(coreapply.ConfigMapVolumeSource().WithName(rootConfigMap)),
			coreapply.Volume().WithName("istio-token").WithProjected(coreapply.ProjectedVolumeSource().WithSources(
				coreapply.VolumeProjection().WithServiceAccountToken(coreapply.ServiceAccountTokenProjection().
					WithAudience(tokenAudience).WithExpirationSeconds(tokenLifetime).WithPath("istio-token")))),
		)
	// Replicas are not set: they are the user's, or an autoscaler's.
	return appsapply.Deployment(gw.Name, gw.Namespace).
		WithLabels(d.labels(gw)).WithAnnotations(annotations(gw)).WithOwnerReferences(owner(gw)).
		WithSpec(appsapply.DeploymentSpec().
			WithSelector(metaapply.LabelSelector().WithMatchLabels(map[string]string{gatewayLabel: gw.Name})).
			WithTemplate(coreapply.PodTemplateSpec().WithLabels(podLabels).WithAnnotations(podAnnotations).WithSpec(pod)))
}

func (d *Deployer) container(gw *gatewayv1.Gateway) *coreapply.ContainerApplyConfiguration {
	istiod := "https://istiod." + d.cfg.SystemNamespace + ".svc:15012"
	probe := func() *coreapply.ProbeApplyConfiguration {
		return coreapply.Probe().WithTimeoutSeconds(1).WithHTTPGet(
			coreapply.HTTPGetAction().WithPath("/healthz/ready").WithPort(intstr.FromInt32(readinessPort)).WithScheme(corev1.URISchemeHTTP))
	}
	port := func(name string, number int32) *coreapply.ContainerPortApplyConfiguration {
		return coreapply.ContainerPort().WithName(name).WithContainerPort(number).WithProtocol(corev1.ProtocolTCP)
	}
	return coreapply.Container().WithName(container).WithImage(d.cfg.Image).WithImagePullPolicy(corev1.PullIfNotPresent).
		WithPorts(port("mesh", hbonePort), port("metrics", statsPort), port("status-port", readinessPort)).
		WithEnv(
			fromField("POD_NAME", "metadata.name"), fromField("POD_NAMESPACE", "metadata.namespace"),
			fromField("INSTANCE_IP", "status.podIP"), fromField("NODE_NAME", "spec.nodeName"),
			fromField("SERVICE_ACCOUNT", "spec.serviceAccountName"),
			value("GATEWAY_NAME", gw.Name), value("CLUSTER_ID", d.cfg.ClusterID), value("TRUST_DOMAIN", d.cfg.TrustDomain),
			value("NETWORK", d.cfg.Network), value("XDS_ADDRESS", istiod), value("CA_ADDRESS", istiod),
			value("TERMINATION_GRACE_PERIOD", "25s"),
		).
		WithVolumeMounts(
			coreapply.VolumeMount().WithName("istiod-ca-cert").WithMountPath("/var/run/secrets/istio").WithReadOnly(true),
			coreapply.VolumeMount().WithName("istio-token").WithMountPath("/var/run/secrets/tokens").WithReadOnly(true),
		).
		WithStartupProbe(probe().WithPeriodSeconds(1).WithFailureThreshold(30)).
		WithReadinessProbe(probe().WithPeriodSeconds(5).WithFailureThreshold(3)).
		WithResources(coreapply.ResourceRequirements().
			WithRequests(corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("50m"), corev1.ResourceMemory: resource.MustParse("64Mi")}).
			WithLimits(corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("1Gi")})).
		WithSecurityContext(coreapply.SecurityContext().WithAllowPrivilegeEscalation(false).WithReadOnlyRootFilesystem(true).
			WithCapabilities(coreapply.Capabilities().WithDrop("ALL")))
}

func value(name, v string) *coreapply.EnvVarApplyConfiguration {
	return coreapply.EnvVar().WithName(name).WithValue(v)
}

func fromField(name, path string) *coreapply.EnvVarApplyConfiguration {
	return coreapply.EnvVar().WithName(name).WithValueFrom(
		coreapply.EnvVarSource().WithFieldRef(coreapply.ObjectFieldSelector().WithFieldPath(path)))
}
