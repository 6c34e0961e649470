package translate

// An HTTPRoute or GRPCRoute becomes part of the route table of each service port it is attached to:
//
//  1. parentRefs → the services of this waypoint (or the whole waypoint) it is for; each gets Accepted and ResolvedRefs.
//  2. rules → one route for each match, compiled whole: a value that means nothing refuses the route, and its last valid
//     version stays in force.
//  3. backendRefs → clusters; one that leads nowhere answers 500 for its share, as the Gateway API asks.
//  4. all routes of a table → the order of httproute.Compare, then by age, then by name.
//
// Next: waypoint/route.go

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/internal/httproute"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// invalidBackend is the cluster of backendRefs that lead nowhere.
const invalidBackend = "invalid-backend"

// boundRoute is a valid route attached here.
type boundRoute struct {
	name    types.NamespacedName
	kind    string
	created time.Time
	// hostnames count for routes of the whole waypoint only: a service's routes take any host.
	hostnames []gatewayv1.Hostname
	parents   []boundParent
	rules     []httproute.Route
}

// boundParent is one thing a route is attached to: a service, or (with a zero name) the waypoint. Port 0 means all ports.
type boundParent struct {
	service types.NamespacedName
	port    uint16
}

// routeObject is what HTTPRoutes and GRPCRoutes have in common.
type routeObject struct {
	kind      string
	meta      metav1.ObjectMeta
	parents   []gatewayv1.ParentReference
	hostnames []gatewayv1.Hostname
	// compile makes the rules; unresolved says which backendRefs lead nowhere.
	compile func(w *waypointBuilder) (rules []httproute.Route, unresolved *unresolvedRef, err error)
}

// unresolvedRef is the first backendRef of a route that leads nowhere.
type unresolvedRef struct{ reason, message string }

func httpRouteObject(r *gatewayv1.HTTPRoute) routeObject {
	return routeObject{kind: "HTTPRoute", meta: r.ObjectMeta, parents: r.Spec.ParentRefs, hostnames: r.Spec.Hostnames,
		compile: func(w *waypointBuilder) ([]httproute.Route, *unresolvedRef, error) { return w.compileHTTPRoute(r) }}
}

func grpcRouteObject(r *gatewayv1.GRPCRoute) routeObject {
	return routeObject{kind: "GRPCRoute", meta: r.ObjectMeta, parents: r.Spec.ParentRefs, hostnames: r.Spec.Hostnames,
		compile: func(w *waypointBuilder) ([]httproute.Route, *unresolvedRef, error) { return w.compileGRPCRoute(r) }}
}

// checkRoutes finds the routes that are attached here, compiles them and reports on them.
func (w *waypointBuilder) checkRoutes() {
	w.memory.httpRoutes = map[types.NamespacedName]*gatewayv1.HTTPRoute{}
	w.memory.grpcRoutes = map[types.NamespacedName]*gatewayv1.GRPCRoute{}
	for _, r := range w.in.HTTPRoutes {
		name := types.NamespacedName{Namespace: r.Namespace, Name: r.Name}
		last := w.in.Previous.httpRoutes[name]
		switch w.checkRoute(httpRouteObject(r), last != nil) {
		case routeInForce:
			w.memory.httpRoutes[name] = r
		case routeInvalid:
			if last != nil && w.keepRoute(httpRouteObject(last)) {
				w.memory.httpRoutes[name] = last
			}
		}
	}
	for _, r := range w.in.GRPCRoutes {
		name := types.NamespacedName{Namespace: r.Namespace, Name: r.Name}
		last := w.in.Previous.grpcRoutes[name]
		switch w.checkRoute(grpcRouteObject(r), last != nil) {
		case routeInForce:
			w.memory.grpcRoutes[name] = r
		case routeInvalid:
			if last != nil && w.keepRoute(grpcRouteObject(last)) {
				w.memory.grpcRoutes[name] = last
			}
		}
	}
	slices.SortFunc(w.routes, func(a, b boundRoute) int {
		return cmp.Or(a.created.Compare(b.created), cmp.Compare(a.name.String(), b.name.String()), cmp.Compare(a.kind, b.kind))
	})
}

// routeOutcome is what became of a route object.
type routeOutcome uint8

const (
	routeElsewhere routeOutcome = iota
	routeInForce
	routeInvalid
)

// checkRoute compiles a route and adds its conditions. hasLast tells that an older version can stay in force.
func (w *waypointBuilder) checkRoute(r routeObject, hasLast bool) routeOutcome {
	bound := bindRoute(r)
	var concerned []int
	refused := map[int]string{}
	for i, ref := range r.parents {
		parent, ours, why := w.parent(r, ref)
		if !ours {
			continue
		}
		concerned = append(concerned, i)
		if why != "" {
			refused[i] = why
		} else {
			bound.parents = append(bound.parents, parent)
		}
	}
	if len(concerned) == 0 {
		return routeElsewhere
	}
	rules, unresolved, err := r.compile(w)
	for _, i := range concerned {
		w.addRouteConditions(r, &r.parents[i], refused[i], unresolved, err, hasLast)
	}
	if err != nil {
		return routeInvalid
	}
	bound.rules = rules
	if len(bound.parents) > 0 {
		w.routes = append(w.routes, bound)
	}
	return routeInForce
}

// keepRoute puts an older version of a route in force again, without conditions.
func (w *waypointBuilder) keepRoute(r routeObject) bool {
	bound := bindRoute(r)
	for _, ref := range r.parents {
		if parent, ours, why := w.parent(r, ref); ours && why == "" {
			bound.parents = append(bound.parents, parent)
		}
	}
	rules, _, err := r.compile(w)
	if err != nil || len(bound.parents) == 0 {
		return false
	}
	bound.rules = rules
	w.routes = append(w.routes, bound)
	return true
}

func bindRoute(r routeObject) boundRoute {
	return boundRoute{name: types.NamespacedName{Namespace: r.meta.Namespace, Name: r.meta.Name}, kind: r.kind,
		created: r.meta.CreationTimestamp.Time, hostnames: r.hostnames}
}

func (w *waypointBuilder) addRouteConditions(r routeObject, parent *gatewayv1.ParentReference, refused string, unresolved *unresolvedRef, err error, hasLast bool) {
	c := WaypointCondition{Kind: r.kind, Object: types.NamespacedName{Namespace: r.meta.Namespace, Name: r.meta.Name},
		Generation: r.meta.Generation, Parent: parent}
	accepted, resolved := c, c
	accepted.Type, resolved.Type = string(gatewayv1.RouteConditionAccepted), string(gatewayv1.RouteConditionResolvedRefs)
	switch {
	case err != nil:
		accepted.Reason, accepted.Message = string(gatewayv1.RouteReasonUnsupportedValue), err.Error()
		if hasLast {
			accepted.Message += "; the last valid version stays in force"
		}
	case refused != "":
		accepted.Reason, accepted.Message = string(gatewayv1.RouteReasonNoMatchingParent), refused
	default:
		accepted.Status, accepted.Reason = true, string(gatewayv1.RouteReasonAccepted)
		accepted.Message = fmt.Sprintf("in force on waypoint %s/%s", w.in.Gateway.Namespace, w.in.Gateway.Name)
	}
	if unresolved != nil {
		resolved.Reason, resolved.Message = unresolved.reason, unresolved.message
	} else {
		resolved.Status, resolved.Reason = true, string(gatewayv1.RouteReasonResolvedRefs)
		resolved.Message = "all backendRefs lead to a service"
	}
	w.conditions = append(w.conditions, accepted, resolved)
}

// parent reads a parentRef. ours tells whether it names something of this waypoint; refused, why it cannot be attached.
func (w *waypointBuilder) parent(r routeObject, ref gatewayv1.ParentReference) (_ boundParent, ours bool, refused string) {
	namespace := r.meta.Namespace
	if ref.Namespace != nil {
		namespace = string(*ref.Namespace)
	}
	var port uint16
	if ref.Port != nil {
		port = uint16(*ref.Port)
	}
	gw := w.in.Gateway
	if refersToService(ref.Group, ref.Kind, "Gateway") {
		name := types.NamespacedName{Namespace: namespace, Name: string(ref.Name)}
		if _, ok := w.attached[name]; !ok {
			return boundParent{}, false, ""
		}
		if namespace != r.meta.Namespace {
			return boundParent{}, true, "a waypoint takes a service's routes from the service's own namespace only"
		}
		if port != 0 && !hasPort(w.known[name], port) {
			return boundParent{}, true, fmt.Sprintf("the service has no port %d", port)
		}
		return boundParent{service: name, port: port}, true, ""
	}
	if (ref.Kind != nil && *ref.Kind != "Gateway") || (ref.Group != nil && *ref.Group != gatewayv1.GroupName) ||
		namespace != gw.Namespace || string(ref.Name) != gw.Name {
		return boundParent{}, false, ""
	}
	return boundParent{}, true, w.refusedByListener(r, ref.SectionName, port)
}

func hasPort(s WaypointService, port uint16) bool {
	return slices.ContainsFunc(sortedPorts(s.Service), func(p mesh.Port) bool { return p.ServicePort == port })
}

// refusedByListener tells why no listener of the Gateway takes a route; "" when one does.
func (w *waypointBuilder) refusedByListener(r routeObject, section *gatewayv1.SectionName, port uint16) string {
	why := "the Gateway has no such listener"
	for _, l := range w.in.Gateway.Spec.Listeners {
		if (section != nil && *section != l.Name) || (port != 0 && port != uint16(l.Port)) {
			continue
		}
		from := gatewayv1.NamespacesFromSame
		if a := l.AllowedRoutes; a != nil && a.Namespaces != nil && a.Namespaces.From != nil {
			from = *a.Namespaces.From
		}
		if from == gatewayv1.NamespacesFromAll || (from == gatewayv1.NamespacesFromSame && r.meta.Namespace == w.in.Gateway.Namespace) {
			return ""
		}
		why = fmt.Sprintf("listener %s does not take routes of namespace %s", l.Name, r.meta.Namespace)
	}
	return why
}

// routeTable is the routes of one service port: those of the service, or else those of the whole waypoint, or else one
// that sends everything to the service itself.
func (w *waypointBuilder) routeTable(name string, s WaypointService, port uint16) *routev3.RouteConfiguration {
	var own, shared []boundRoute
	for _, r := range w.routes {
		for _, p := range r.parents {
			switch {
			case p.service == serviceName(s) && (p.port == 0 || p.port == port):
				own = append(own, r)
			case p.service == types.NamespacedName{} && len(shared) == 0, p.service == types.NamespacedName{} && shared[len(shared)-1].name != r.name:
				shared = append(shared, r)
			}
		}
	}
	if len(own) > 0 {
		return table(name, virtualHost("default", "*", own))
	}
	if len(shared) > 0 {
		return table(name, virtualHosts(shared)...)
	}
	return singleRoute(name)
}

// singleRoute is the table that sends everything to the cluster of its own name.
func singleRoute(name string) *routev3.RouteConfiguration {
	return table(name, encodeHost(httproute.Host{Name: "default", Domains: []string{"*"}, Routes: []httproute.Route{{
		Name: "default", Match: httproute.Match{Path: httproute.StringMatch{Kind: httproute.Prefix, Value: "/"}},
		Clusters: []httproute.Weighted{{Cluster: name, Weight: 1}}}}}))
}

func table(name string, hosts ...*routev3.VirtualHost) *routev3.RouteConfiguration {
	return &routev3.RouteConfiguration{Name: name, VirtualHosts: hosts}
}

// virtualHost orders the rules of routes, which are sorted by age already.
func virtualHost(name, domain string, routes []boundRoute) *routev3.VirtualHost {
	h := httproute.Host{Name: name, Domains: []string{domain}}
	if domain != "*" {
		h.Domains = append(h.Domains, domain+":*")
	}
	for _, r := range routes {
		h.Routes = append(h.Routes, r.rules...)
	}
	slices.SortStableFunc(h.Routes, func(a, b httproute.Route) int { return httproute.Compare(&a.Match, &b.Match) })
	return encodeHost(h)
}

// virtualHosts groups routes by hostname. A host's table has the routes that name it first and those that name a wider
// one, or none, after them.
func virtualHosts(routes []boundRoute) []*routev3.VirtualHost {
	names := map[gatewayv1.Hostname]struct{}{}
	for _, r := range routes {
		for _, h := range hostnamesOf(r) {
			names[h] = struct{}{}
		}
	}
	var out []*routev3.VirtualHost
	for _, name := range sortedHostnames(names) {
		var own []boundRoute
		for _, wider := range widening(name) {
			for _, r := range routes {
				if slices.Contains(hostnamesOf(r), wider) {
					own = append(own, r)
				}
			}
		}
		out = append(out, virtualHost(string(name), string(name), own))
	}
	return out
}
