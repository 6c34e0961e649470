package translate

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// WorkloadInput is all that one pod's workload is made of.
type WorkloadInput struct {
	Pod             *corev1.Pod
	NamespaceLabels map[string]string
	// Node the pod runs on; nil when it is not known (yet).
	Node *corev1.Node
	// Services the pod is a ready endpoint of.
	Services  map[mesh.NamespacedHostname][]mesh.Port
	Waypoints Waypoints
	// Selectors are the selector policies of the pod's namespace and of the root namespace that are in force.
	Selectors []PolicySelector
	Peers     PeerModes
}

// PolicySelector is a policy of ScopeSelector and the labels it selects.
type PolicySelector struct {
	Key       string
	Namespace string
	Labels    map[string]string
}

// WorkloadUID names a pod's workload.
func WorkloadUID(m Mesh, pod types.NamespacedName) string {
	return m.ClusterID + "//Pod/" + pod.Namespace + "/" + pod.Name
}

// Workload translates a pod; nil while it has no address and once it has finished. The binding is that to a waypoint
// for workload traffic.
func Workload(m Mesh, in WorkloadInput) (*mesh.Workload, Binding) {
	pod := in.Pod
	addresses := podAddresses(pod)
	if len(addresses) == 0 || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return nil, Binding{}
	}
	w := &mesh.Workload{
		UID: WorkloadUID(m, types.NamespacedName{Namespace: pod.Namespace, Name: pod.Name}), Name: pod.Name, Namespace: pod.Namespace,
		TrustDomain: m.TrustDomain, ServiceAccount: serviceAccount(pod), Network: m.Network, ClusterID: m.ClusterID,
		Node: pod.Spec.NodeName, Addresses: addresses, HostNetwork: pod.Spec.HostNetwork,
		Services: in.Services, Healthy: healthy(m, pod), Locality: locality(pod, in.Node),
	}
	if n := firstOf(pod.Labels, labelNetwork); n != "" {
		w.Network = n
	}
	w.WorkloadName, w.WorkloadType = owner(pod)
	w.CanonicalName = firstOf(pod.Labels, labelCanonicalName, "app.kubernetes.io/name", "app")
	if w.CanonicalName == "" {
		w.CanonicalName = w.WorkloadName
	}
	w.CanonicalRevision = firstOf(pod.Labels, labelCanonicalRevision, "app.kubernetes.io/version", "version")
	if w.CanonicalRevision == "" {
		w.CanonicalRevision = "latest"
	}
	gateway := types.NamespacedName{Namespace: pod.Namespace, Name: pod.Labels[labelGatewayName]}
	_, w.NativeTunnel = in.Waypoints[gateway]
	if w.NativeTunnel || captured(m, pod, in.NamespaceLabels) {
		w.Protocol = mesh.ProtocolHBONE
	}
	var binding Binding
	if !w.NativeTunnel && !pod.Spec.HostNetwork {
		binding = bind(in.Waypoints, trafficWorkload, pod.Namespace, pod.Labels, in.NamespaceLabels)
		w.Waypoint = binding.address(m)
	}
	w.Policies = workloadPolicies(in)
	return w, binding
}

func workloadPolicies(in WorkloadInput) []string {
	var keys []string
	for _, s := range in.Selectors {
		if selects(s.Labels, in.Pod.Labels) {
			keys = append(keys, s.Key)
		}
	}
	if peer := in.Peers.Policy(in.Pod.Labels); peer != "" {
		keys = append(keys, peer)
	}
	slices.Sort(keys)
	return keys
}

// captured tells whether the pod's traffic goes through ztunnel.
func captured(m Mesh, pod *corev1.Pod, namespaceLabels map[string]string) bool {
	if pod.Spec.HostNetwork {
		return false
	}
	if pod.Annotations[annotationRedirection] == "enabled" {
		return true
	}
	if _, sidecar := pod.Annotations[annotationSidecarStatus]; !m.CapturedByLabel || sidecar {
		return false
	}
	mode := pod.Labels[labelDataplaneMode]
	if mode == "" {
		mode = namespaceLabels[labelDataplaneMode]
	}
	return mode == dataplaneAmbient
}

func podAddresses(pod *corev1.Pod) []netip.Addr {
	var out []netip.Addr
	add := func(text string) {
		if ip, err := netip.ParseAddr(text); err == nil && !slices.Contains(out, ip.Unmap()) {
			out = append(out, ip.Unmap())
		}
	}
	add(pod.Status.PodIP)
	for _, ip := range pod.Status.PodIPs {
		add(ip.IP)
	}
	return out
}

func serviceAccount(pod *corev1.Pod) string {
	if pod.Spec.ServiceAccountName == "" {
		return "default"
	}
	return pod.Spec.ServiceAccountName
}

// healthy: the pod is ready and not on its way out. In a directory a pod without a Ready condition counts as ready.
func healthy(m Mesh, pod *corev1.Pod) bool {
	if pod.DeletionTimestamp != nil {
		return false
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return m.CapturedByLabel
}

// cronJobRun is the name of a Job that a CronJob made: the CronJob's and the minute it was due.
var cronJobRun = regexp.MustCompile(`^(.+)-\d{8,10}$`)

// owner is the name and type of what the user created: a Deployment rather than its ReplicaSet.
func owner(pod *corev1.Pod) (name, kind string) {
	if n := pod.Labels[labelWorkloadName]; n != "" {
		return n, "deployment"
	}
	for _, ref := range pod.OwnerReferences {
		if ref.Controller == nil || !*ref.Controller {
			continue
		}
		switch ref.Kind {
		case "ReplicaSet":
			if name, ok := strings.CutSuffix(ref.Name, "-"+pod.Labels["pod-template-hash"]); ok {
				return name, "deployment"
			}
			return ref.Name, "replicaset"
		case "Job":
			if m := cronJobRun.FindStringSubmatch(ref.Name); m != nil {
				return m[1], "cronjob"
			}
		}
		return ref.Name, strings.ToLower(ref.Kind)
	}
	return pod.Name, "pod"
}

// locality is the node's, unless the pod says otherwise as "region.zone.subzone" or "region/zone/subzone".
func locality(pod *corev1.Pod, node *corev1.Node) mesh.Locality {
	if text := pod.Labels[labelLocality]; text != "" {
		separator := "."
		if strings.Contains(text, "/") {
			separator = "/"
		}
		parts := append(strings.SplitN(text, separator, 3), "", "")
		return mesh.Locality{Region: parts[0], Zone: parts[1], Subzone: parts[2]}
	}
	return nodeLocality(node)
}

func nodeLocality(node *corev1.Node) mesh.Locality {
	if node == nil {
		return mesh.Locality{}
	}
	return mesh.Locality{
		Region:  firstOf(node.Labels, corev1.LabelTopologyRegion, corev1.LabelFailureDomainBetaRegion),
		Zone:    firstOf(node.Labels, corev1.LabelTopologyZone, corev1.LabelFailureDomainBetaZone),
		Subzone: node.Labels[labelSubzone],
	}
}

// EndpointWorkload stands for an address behind a service that no pod has, such as the API server's: reached in plain
// text, by address only.
func EndpointWorkload(m Mesh, namespace string, b Backend, services map[mesh.NamespacedHostname][]mesh.Port, node *corev1.Node) *mesh.Workload {
	w := &mesh.Workload{
		UID:  fmt.Sprintf("%s/discovery.k8s.io/EndpointSlice/%s/%s/%s", m.ClusterID, namespace, b.Slice, b.Address),
		Name: b.Slice + "/" + b.Address.String(), Namespace: namespace, TrustDomain: m.TrustDomain,
		Network: m.Network, ClusterID: m.ClusterID, Node: b.Node, Addresses: []netip.Addr{b.Address}, Services: services,
		CanonicalName: b.Slice, CanonicalRevision: "latest", WorkloadName: b.Slice, WorkloadType: "pod",
		Healthy: true, Locality: nodeLocality(node),
	}
	if w.Locality.Zone == "" {
		w.Locality.Zone = b.Zone
	}
	return w
}
