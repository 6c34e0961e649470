package translate

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// The type URLs that a waypoint subscribes to, in the order in which a change is best sent.
const (
	ClusterType  = "type.googleapis.com/envoy.config.cluster.v3.Cluster"
	EndpointType = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
	ListenerType = "type.googleapis.com/envoy.config.listener.v3.Listener"
	RouteType    = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
)

// WaypointInput is all that the configuration of one waypoint is made of. The slices may be in any order; the output
// does not depend on it.
type WaypointInput struct {
	// Gateway is the waypoint, of class istio-waypoint.
	Gateway *gatewayv1.Gateway
	// TrustDomain and RootNamespace are the mesh's; empty means cluster.local and istio-system.
	TrustDomain   string
	RootNamespace string
	// Services are bound to the waypoint by istio.io/use-waypoint: it takes connections to their addresses.
	Services []WaypointService
	// Workloads are bound to it themselves (istio.io/waypoint-for: workload or all): it takes connections to them.
	Workloads []*mesh.Workload
	// Backends are services that routes may send to although they are not in Services: those that WaypointBackends
	// names, or any larger set. A service that is in neither does not exist for the routes.
	Backends []WaypointService
	// HTTPRoutes and GRPCRoutes: those whose parentRefs name a service of Services or the Gateway, or any larger set.
	HTTPRoutes []*gatewayv1.HTTPRoute
	GRPCRoutes []*gatewayv1.GRPCRoute
	// ReferenceGrants allow routes to send to services of other namespaces: those of the backends' namespaces, or more.
	ReferenceGrants []*gatewayv1.ReferenceGrant
	// Policies: those whose targetRefs name the Gateway, a service of Services, or (in the root namespace) the
	// GatewayClass, or any larger set.
	Policies []*securityv1.AuthorizationPolicy
	// Previous is WaypointOutput.Memory of the call before this one for the same waypoint; the zero value for the first.
	Previous WaypointMemory
}

// WaypointMemory is the version in force of each object that a waypoint uses, to be handed to the next call: an object
// that becomes invalid then stays in force as it was. It is never changed once made.
type WaypointMemory struct {
	httpRoutes map[types.NamespacedName]*gatewayv1.HTTPRoute
	grpcRoutes map[types.NamespacedName]*gatewayv1.GRPCRoute
	policies   map[types.NamespacedName]*securityv1.AuthorizationPolicy
}

// WaypointService is a service as both worlds see it.
type WaypointService struct {
	// Service has the hostname, the addresses and the port numbers.
	Service *mesh.Service
	// Object has the names and protocols of the ports; nil for a service that is not a Kubernetes Service, whose ports
	// then are of unknown protocol.
	Object *corev1.Service
	// Endpoints serve it: Workload.Services[Service.Key()] has the ports. Unhealthy ones are left out by Waypoint.
	Endpoints []*mesh.Workload
}

// WaypointOutput is what the waypoint is sent, each list sorted by name, and what its objects' statuses become.
type WaypointOutput struct {
	Listeners  []*listenerv3.Listener
	Routes     []*routev3.RouteConfiguration
	Clusters   []*clusterv3.Cluster
	Endpoints  []*endpointv3.ClusterLoadAssignment
	Conditions []WaypointCondition
	Memory     WaypointMemory
}

// WaypointCondition is one condition, true or false, of an object that this waypoint looked at.
type WaypointCondition struct {
	// Kind is HTTPRoute, GRPCRoute or AuthorizationPolicy.
	Kind       string
	Object     types.NamespacedName
	Generation int64
	// Parent is the parentRef of a route that the condition belongs to (status.parents[].conditions); nil for a policy
	// (status.conditions).
	Parent *gatewayv1.ParentReference
	// Type is Accepted or ResolvedRefs of a route, WaypointAccepted of a policy.
	Type    string
	Status  bool
	Reason  string
	Message string
}

// Resources packs the configuration for the xDS server: by type URL, then by resource name. Equal configuration packs to
// equal bytes.
func (o WaypointOutput) Resources() (map[string]map[string]*anypb.Any, error) {
	all := map[string]map[string]*anypb.Any{ClusterType: {}, EndpointType: {}, ListenerType: {}, RouteType: {}}
	pack := func(typeURL, name string, m proto.Message) error {
		body, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			return fmt.Errorf("pack %s %s: %w", typeURL, name, err)
		}
		all[typeURL][name] = &anypb.Any{TypeUrl: typeURL, Value: body}
		return nil
	}
	for _, c := range o.Clusters {
		if err := pack(ClusterType, c.Name, c); err != nil {
			return nil, err
		}
	}
	for _, e := range o.Endpoints {
		if err := pack(EndpointType, e.ClusterName, e); err != nil {
			return nil, err
		}
	}
	for _, l := range o.Listeners {
		if err := pack(ListenerType, l.Name, l); err != nil {
			return nil, err
		}
	}
	for _, r := range o.Routes {
		if err := pack(RouteType, r.Name, r); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// WaypointBackends lists the services that routes send to, sorted and without duplicates: those a caller looks up for
// WaypointInput.Backends.
func WaypointBackends(http []*gatewayv1.HTTPRoute, grpc []*gatewayv1.GRPCRoute) []types.NamespacedName {
	seen := map[types.NamespacedName]struct{}{}
	add := func(namespace string, ref gatewayv1.BackendObjectReference) {
		if !refersToService(ref.Group, ref.Kind, "Service") {
			return
		}
		if ref.Namespace != nil {
			namespace = string(*ref.Namespace)
		}
		seen[types.NamespacedName{Namespace: namespace, Name: string(ref.Name)}] = struct{}{}
	}
	for _, r := range http {
		for _, rule := range r.Spec.Rules {
			for _, b := range rule.BackendRefs {
				add(r.Namespace, b.BackendObjectReference)
			}
		}
	}
	for _, r := range grpc {
		for _, rule := range r.Spec.Rules {
			for _, b := range rule.BackendRefs {
				add(r.Namespace, b.BackendObjectReference)
			}
		}
	}
	return slices.SortedFunc(maps.Keys(seen), func(a, b types.NamespacedName) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
}

// refersToService tells whether group and kind, either of which may be left out, are the core Service.
func refersToService(group *gatewayv1.Group, kind *gatewayv1.Kind, absent gatewayv1.Kind) bool {
	k := absent
	if kind != nil {
		k = *kind
	}
	return k == "Service" && (group == nil || *group == "" || *group == "core")
}

// Waypoint makes the configuration of one waypoint. It never fails as a whole: an object it cannot use has a condition
// that says why, and the version of it that was last valid (WaypointInput.Previous) stays in force; one that never was
// valid is left out. docs/waypoint-xds.md lists what is made.
func Waypoint(in WaypointInput) WaypointOutput {
	w := newWaypointBuilder(in)
	w.checkPolicies()
	w.checkRoutes()
	for _, s := range w.services {
		w.addService(s)
	}
	for _, wl := range sortedWorkloads(in.Workloads) {
		w.addWorkload(wl)
	}
	w.addTunnels()
	w.addMainListener()
	return w.output()
}
