package istiod

import (
	"cmp"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/istiod-lite/status"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

// The stages up to what node proxies are given, in the order of pipeline.go's picture. Each reads its dirty objects from
// the sources, calls one translation, and sets its tables.

// authorizations: AuthorizationPolicy → [policies], [selectors]. An invalid object leaves both as they were.
func (p *pipeline) authorizations(d *dirty) {
	for key := range d.policies {
		policy, exists := p.sources.AuthorizationPolicys.Get(key.Namespace, key.Name)
		var result translate.AuthorizationResult
		if exists {
			result = translate.Authorization(p.mesh, policy)
			p.board.Set("ztunnel", status.Object{Kind: "AuthorizationPolicy", Namespace: key.Namespace, Name: key.Name},
				desired(policy.Generation, result.Condition))
		}
		if result.Invalid {
			continue
		}
		reselected := false
		if result.Policy != nil {
			p.policies.Set(key.String(), result.Policy)
		} else {
			p.policies.Delete(key.String())
		}
		if result.Policy != nil && result.Policy.Scope == mesh.ScopeSelector {
			reselected = p.selectors.Set(key, translate.PolicySelector{Key: key.String(), Namespace: key.Namespace, Labels: result.Selector})
		} else {
			reselected = p.selectors.Delete(key)
		}
		if reselected && key.Namespace == p.mesh.RootNamespace {
			p.allPods(d)
		} else if reselected {
			p.podsOf(d, key.Namespace)
		}
	}
}

// peerAuthentications: PeerAuthentication → [peers] and further [policies]. Those of the root namespace are inherited.
func (p *pipeline) peerAuthentications(d *dirty) {
	root := p.sources.PeerAuthentications.Namespace(p.mesh.RootNamespace)
	if _, dirty := d.peers[p.mesh.RootNamespace]; dirty {
		modes, _ := translate.PeerAuthentication(p.mesh, root, nil)
		if !reflect.DeepEqual(modes, p.peerDefault) {
			p.peerDefault = modes
			p.allPods(d)
		}
		for namespace := range p.peers.All() {
			d.peers[namespace] = struct{}{}
		}
	}
	for namespace := range d.peers {
		own := p.sources.PeerAuthentications.Namespace(namespace)
		modes, policies := translate.PeerAuthentication(p.mesh, root, own)
		changed := false
		if len(own) > 0 {
			changed = p.peers.Set(namespace, modes)
		} else {
			changed = p.peers.Delete(namespace)
		}
		if changed {
			p.podsOf(d, namespace)
		}
		var keys []string
		for _, policy := range policies {
			p.policies.Set(policy.Key(), policy)
			keys = append(keys, policy.Key())
		}
		for _, old := range p.converted[namespace] {
			if !slices.Contains(keys, old) {
				p.policies.Delete(old)
			}
		}
		p.converted[namespace] = keys
	}
}

// serviceBackends: Service, EndpointSlice → [backends].
func (p *pipeline) serviceBackends(d *dirty) {
	for key := range d.backends {
		old, _ := p.backends.Get(key)
		var next []translate.Backend
		changed := false
		if svc, ok := p.sources.Services.Get(key.Namespace, key.Name); ok {
			next = translate.Backends(svc, p.sources.SlicesOf(key.Namespace, key.Name))
			changed = p.backends.Set(key, next)
		} else {
			changed = p.backends.Delete(key)
		}
		if !changed {
			continue
		}
		for _, pod := range slices.Concat(podsBehind(old), podsBehind(next)) {
			d.pods[pod] = struct{}{}
		}
		for _, address := range slices.Concat(addressesBehind(old), addressesBehind(next)) {
			for _, pod := range p.sources.PodsAt(address) {
				d.pods[nameOf(pod)] = struct{}{}
			}
		}
		d.endpoints[key] = struct{}{}
		if _, waypoint := p.waypoints[key]; waypoint {
			d.gateways = true
		}
	}
}

// meshServices: Service, Namespace, [waypoints] → [services], [served].
func (p *pipeline) meshServices(d *dirty) {
	for namespace := range d.namespaces {
		for _, svc := range p.sources.Services.Namespace(namespace) {
			d.services[nameOf(svc)] = struct{}{}
		}
	}
	for key := range d.services {
		hostname := mesh.NamespacedHostname{Namespace: key.Namespace, Hostname: p.mesh.Hostname(key.Namespace, key.Name)}
		var service *mesh.Service
		var binding translate.Binding
		if svc, ok := p.sources.Services.Get(key.Namespace, key.Name); ok {
			service, binding = translate.Service(p.mesh, svc, p.namespaceLabels(key.Namespace), p.waypoints)
			p.board.Set("binding", status.Object{Kind: "Service", Namespace: key.Namespace, Name: key.Name}, desired(svc.Generation, binding.Condition))
		}
		changed := false
		if service != nil {
			changed = p.services.Set(hostname, service)
		} else {
			changed = p.services.Delete(hostname)
		}
		if binding.Attached {
			changed = p.served.Set(key, binding.Waypoint) || changed
		} else {
			changed = p.served.Delete(key) || changed
		}
		d.configs = d.configs || changed
	}
}

// podWorkloads: Pod, Namespace, Node, [backends], [selectors], [peers], [waypoints] → [workloads], [taken].
func (p *pipeline) podWorkloads(d *dirty) {
	for namespace := range d.namespaces {
		p.podsOf(d, namespace)
	}
	for node := range d.nodes {
		for _, pod := range p.sources.PodsOn(node) {
			d.pods[nameOf(pod)] = struct{}{}
		}
	}
	for key := range d.pods {
		uid := translate.WorkloadUID(p.mesh, key)
		var workload *mesh.Workload
		var binding translate.Binding
		if pod, ok := p.sources.Pods.Get(key.Namespace, key.Name); ok {
			workload, binding = translate.Workload(p.mesh, p.workloadInput(pod))
		}
		d.configs = p.setWorkload(uid, workload, binding) || d.configs
	}
}

func (p *pipeline) setWorkload(uid string, workload *mesh.Workload, binding translate.Binding) bool {
	changed := false
	if workload != nil {
		changed = p.workloads.Set(uid, workload)
	} else {
		changed = p.workloads.Delete(uid)
	}
	if binding.Attached {
		return p.taken.Set(uid, binding.Waypoint) || changed
	}
	return p.taken.Delete(uid) || changed
}

func (p *pipeline) workloadInput(pod *corev1.Pod) translate.WorkloadInput {
	in := translate.WorkloadInput{
		Pod: pod, NamespaceLabels: p.namespaceLabels(pod.Namespace), Services: p.servicesOfPod(pod),
		Waypoints: p.waypoints, Selectors: p.selectorsIn.Values(pod.Namespace), Peers: p.peerDefault,
	}
	if pod.Namespace != p.mesh.RootNamespace {
		in.Selectors = append(in.Selectors, p.selectorsIn.Values(p.mesh.RootNamespace)...)
	}
	if modes, ok := p.peers.Get(pod.Namespace); ok {
		in.Peers = modes
	}
	if node, ok := p.sources.Nodes.Get("", pod.Spec.NodeName); ok {
		in.Node = node
	}
	return in
}

// servicesOfPod joins what the services say that the pod is behind, by its name or, where they name none, its address.
func (p *pipeline) servicesOfPod(pod *corev1.Pod) map[mesh.NamespacedHostname][]mesh.Port {
	services := p.backingPod.Keys(nameOf(pod))
	addresses := map[string]bool{}
	if !pod.Spec.HostNetwork {
		for _, ip := range pod.Status.PodIPs {
			addresses[ip.IP] = true
			services = append(services, p.backingAddress.Keys(ip.IP)...)
		}
	}
	out := map[mesh.NamespacedHostname][]mesh.Port{}
	for _, service := range services {
		if service.Namespace != pod.Namespace {
			continue
		}
		backends, _ := p.backends.Get(service)
		key := mesh.NamespacedHostname{Namespace: service.Namespace, Hostname: p.mesh.Hostname(service.Namespace, service.Name)}
		for _, b := range backends {
			if b.Pod == nameOf(pod) || b.Pod.Name == "" && addresses[b.Address.String()] {
				out[key] = joinPorts(out[key], b.Ports)
			}
		}
	}
	return out
}

func joinPorts(a, b []mesh.Port) []mesh.Port {
	joined := slices.SortedFunc(slices.Values(slices.Concat(a, b)), func(x, y mesh.Port) int {
		return cmp.Or(cmp.Compare(x.ServicePort, y.ServicePort), cmp.Compare(x.TargetPort, y.TargetPort))
	})
	return slices.Compact(joined)
}

// endpointWorkloads: [backends] that no pod stands behind → [workloads].
func (p *pipeline) endpointWorkloads(d *dirty) {
	for address := range d.addresses {
		for _, service := range p.backingAddress.Keys(address) {
			d.endpoints[service] = struct{}{}
		}
	}
	for service := range d.endpoints {
		backends, _ := p.backends.Get(service)
		key := mesh.NamespacedHostname{Namespace: service.Namespace, Hostname: p.mesh.Hostname(service.Namespace, service.Name)}
		var uids []string
		for _, b := range backends {
			if b.Pod.Name != "" || p.podAt(service.Namespace, b.Address.String()) {
				continue
			}
			node, _ := p.sources.Nodes.Get("", b.Node)
			w := translate.EndpointWorkload(p.mesh, service.Namespace, b, map[mesh.NamespacedHostname][]mesh.Port{key: b.Ports}, node)
			d.configs = p.workloads.Set(w.UID, w) || d.configs
			uids = append(uids, w.UID)
		}
		for _, uid := range p.bare[service] {
			if !slices.Contains(uids, uid) {
				d.configs = p.workloads.Delete(uid) || d.configs
			}
		}
		if len(uids) > 0 {
			p.bare[service] = uids
		} else {
			delete(p.bare, service)
		}
	}
}

func (p *pipeline) podAt(namespace, address string) bool {
	return slices.ContainsFunc(p.sources.PodsAt(address), func(pod *corev1.Pod) bool { return pod.Namespace == namespace })
}

func (p *pipeline) namespaceLabels(namespace string) map[string]string {
	ns, ok := p.sources.Namespaces.Get("", namespace)
	if !ok {
		return nil
	}
	return ns.Labels
}

func (p *pipeline) podsOf(d *dirty, namespace string) {
	for _, pod := range p.sources.Pods.Namespace(namespace) {
		d.pods[nameOf(pod)] = struct{}{}
	}
}

func (p *pipeline) allPods(d *dirty) {
	for _, pod := range p.sources.Pods.List() {
		d.pods[nameOf(pod)] = struct{}{}
	}
}

func (p *pipeline) allServices(d *dirty) {
	for _, svc := range p.sources.Services.List() {
		d.services[nameOf(svc)] = struct{}{}
	}
}

func servicesOf(w *mesh.Workload) []mesh.NamespacedHostname {
	out := make([]mesh.NamespacedHostname, 0, len(w.Services))
	for key := range w.Services {
		out = append(out, key)
	}
	return out
}

// desired is a status of one condition, or of none.
func desired(generation int64, c *translate.Condition) status.Desired {
	if c == nil {
		return status.Desired{}
	}
	return status.Desired{Conditions: []status.Condition{{
		Generation: generation, Type: c.Type, Status: c.Status, Reason: c.Reason, Message: c.Message,
	}}}
}
