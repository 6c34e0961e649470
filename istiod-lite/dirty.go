package istiod

import (
	"maps"
	"sync"

	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/istiod-lite/source"
	"github.com/fairlead-mesh/fairlead/istiod-lite/status"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

// dirty is what a recompute has to look at again.
type dirty struct {
	policies map[name]struct{}
	// peers are namespaces whose PeerAuthentications changed.
	peers map[string]struct{}
	// backends are services whose EndpointSlices, or whose own ports, changed.
	backends map[name]struct{}
	services map[name]struct{}
	pods     map[name]struct{}
	// endpoints are services behind which addresses without a pod may have come or gone; addresses those of pods that
	// came or went.
	endpoints map[name]struct{}
	addresses map[string]struct{}
	// namespaces are those of which everything is dirty.
	namespaces map[string]struct{}
	nodes      map[string]struct{}
	// gateways: a waypoint, its class or what deploys it changed; configs: something that waypoints are configured with.
	gateways, configs bool
}

func newDirty() *dirty {
	return &dirty{
		policies: map[name]struct{}{}, peers: map[string]struct{}{}, backends: map[name]struct{}{}, services: map[name]struct{}{},
		pods: map[name]struct{}{}, endpoints: map[name]struct{}{}, addresses: map[string]struct{}{},
		namespaces: map[string]struct{}{}, nodes: map[string]struct{}{},
	}
}

// dirtySet collects what is dirty between two recomputes. It is safe for concurrent use.
type dirtySet struct {
	wake chan struct{}
	mu   sync.Mutex
	now  *dirty
}

func newDirtySet() *dirtySet {
	return &dirtySet{wake: make(chan struct{}, 1), now: newDirty()}
}

func (s *dirtySet) mark(f func(*dirty)) {
	s.mu.Lock()
	f(s.now)
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *dirtySet) take() *dirty {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.now
	s.now = newDirty()
	return d
}

// note marks what a change of one object makes dirty. It is called from the informers' goroutines.
func (p *pipeline) note(c source.Change) {
	if c.New == nil {
		p.forget(c.Old)
	}
	p.dirty.mark(func(d *dirty) {
		for _, obj := range []runtime.Object{c.Old, c.New} {
			if obj != nil && matters(c) {
				d.note(obj)
			}
		}
	})
	if p.gateways != nil {
		p.gateways.note(c)
	}
}

// matters tells whether a change can change anything: namespaces and nodes do by their labels only, and are touched
// all the time.
func matters(c source.Change) bool {
	if c.Old == nil || c.New == nil {
		return true
	}
	switch c.New.(type) {
	case *corev1.Namespace, *corev1.Node:
		return !maps.Equal(c.Old.(metav1.Object).GetLabels(), c.New.(metav1.Object).GetLabels())
	}
	return true
}

func (d *dirty) note(obj runtime.Object) {
	switch o := obj.(type) {
	case *corev1.Namespace:
		d.namespaces[o.Name] = struct{}{}
	case *corev1.Node:
		d.nodes[o.Name] = struct{}{}
	case *corev1.Pod:
		d.pods[nameOf(o)] = struct{}{}
		for _, ip := range o.Status.PodIPs {
			d.addresses[ip.IP] = struct{}{}
		}
	case *corev1.Service:
		d.services[nameOf(o)] = struct{}{}
		d.backends[nameOf(o)] = struct{}{}
		if o.Labels[gatewayNameLabel] != "" {
			d.gateways = true
		}
	case *discoveryv1.EndpointSlice:
		if service := o.Labels[discoveryv1.LabelServiceName]; service != "" {
			d.backends[name{Namespace: o.Namespace, Name: service}] = struct{}{}
		}
	case *appsv1.Deployment:
		if o.Labels[gatewayNameLabel] != "" {
			d.gateways = true
		}
	case *securityv1.AuthorizationPolicy:
		d.policies[nameOf(o)] = struct{}{}
		d.configs = true
	case *securityv1.PeerAuthentication:
		d.peers[o.Namespace] = struct{}{}
	case *gatewayv1.Gateway, *gatewayv1.GatewayClass:
		d.gateways, d.configs = true, true
	case *gatewayv1.HTTPRoute, *gatewayv1.GRPCRoute, *gatewayv1.ReferenceGrant:
		d.configs = true
	}
}

// gatewayNameLabel is on all that a Gateway was deployed as.
const gatewayNameLabel = "gateway.networking.k8s.io/gateway-name"

func nameOf(o metav1.Object) name { return name{Namespace: o.GetNamespace(), Name: o.GetName()} }

// forget takes an object that is gone off the status board.
func (p *pipeline) forget(obj runtime.Object) {
	kind := ""
	switch obj.(type) {
	case *securityv1.AuthorizationPolicy:
		kind = "AuthorizationPolicy"
	case *corev1.Service:
		kind = "Service"
	case *gatewayv1.Gateway:
		kind = "Gateway"
	case *gatewayv1.GatewayClass:
		kind = "GatewayClass"
	case *gatewayv1.HTTPRoute:
		kind = "HTTPRoute"
	case *gatewayv1.GRPCRoute:
		kind = "GRPCRoute"
	default:
		return
	}
	m := obj.(metav1.Object)
	p.board.Forget(status.Object{Kind: kind, Namespace: m.GetNamespace(), Name: m.GetName()})
}

// noteEverything makes all that was listed dirty.
func (p *pipeline) noteEverything() {
	p.dirty.mark(func(d *dirty) {
		d.gateways, d.configs = true, true
		s := p.sources
		for _, o := range s.AuthorizationPolicys.List() {
			d.note(o)
		}
		for _, o := range s.PeerAuthentications.List() {
			d.note(o)
		}
		for _, o := range s.Services.List() {
			d.note(o)
		}
		for _, o := range s.Pods.List() {
			d.note(o)
		}
	})
}

// podsBehind are the pods named.
func podsBehind(backends []translate.Backend) []name {
	var out []name
	for _, b := range backends {
		if b.Pod.Name != "" {
			out = append(out, b.Pod)
		}
	}
	return out
}

// addressesBehind are the addresses that no pod was named for.
func addressesBehind(backends []translate.Backend) []string {
	var out []string
	for _, b := range backends {
		if b.Pod.Name == "" {
			out = append(out, b.Address.String())
		}
	}
	return out
}
