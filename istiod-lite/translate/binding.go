package translate

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// ConditionWaypointBound says whether the waypoint that an object asks for takes its traffic.
const ConditionWaypointBound = "istio.io/WaypointBound"

// WaypointClass is the GatewayClass whose Gateways are waypoints.
const WaypointClass = "istio-waypoint"

// traffic is what a waypoint takes: connections to services, or to workloads themselves.
type traffic string

const (
	trafficService  traffic = "service"
	trafficWorkload traffic = "workload"
	trafficAll      traffic = "all"
)

// WaypointFacts are what binding to a waypoint depends on.
type WaypointFacts struct {
	For traffic
	// Ready: an endpoint of the waypoint's Service takes connections.
	Ready bool
	// from and selector say which namespaces may use it besides its own.
	from     gatewayv1.FromNamespaces
	selector labels.Selector
}

// Waypoints are all waypoints of the mesh.
type Waypoints map[types.NamespacedName]WaypointFacts

// NewWaypointFacts reads a Gateway of class istio-waypoint; class may be nil.
func NewWaypointFacts(gw *gatewayv1.Gateway, class *gatewayv1.GatewayClass, ready bool) WaypointFacts {
	f := WaypointFacts{For: trafficService, Ready: ready, from: gatewayv1.NamespacesFromSame, selector: labels.Nothing()}
	if class != nil && class.Labels[labelWaypointFor] != "" {
		f.For = traffic(class.Labels[labelWaypointFor])
	}
	if v := gw.Labels[labelWaypointFor]; v != "" {
		f.For = traffic(v)
	}
	for _, l := range gw.Spec.Listeners {
		if l.Protocol != "HBONE" || l.AllowedRoutes == nil || l.AllowedRoutes.Namespaces == nil || l.AllowedRoutes.Namespaces.From == nil {
			continue
		}
		f.from = *l.AllowedRoutes.Namespaces.From
		if s, err := metav1.LabelSelectorAsSelector(l.AllowedRoutes.Namespaces.Selector); err == nil {
			f.selector = s
		}
		break
	}
	return f
}

func (f WaypointFacts) takes(t traffic) bool { return f.For == t || f.For == trafficAll }

func (f WaypointFacts) admits(own, namespace string, namespaceLabels map[string]string) bool {
	switch {
	case own == namespace, f.from == gatewayv1.NamespacesFromAll:
		return true
	case f.from == gatewayv1.NamespacesFromSelector:
		return f.selector.Matches(labels.Set(namespaceLabels))
	default:
		return false
	}
}

// Binding is an object's use of a waypoint; the zero value: none asked for.
type Binding struct {
	// Waypoint is named although it may not be there: traffic of an object that asks for a waypoint never goes past it.
	Waypoint types.NamespacedName
	// Attached: the waypoint exists and lets the object use it, so that its configuration has the object.
	Attached bool
	// Condition to report; nil when none was asked for.
	Condition *Condition
}

// bind decides which waypoint takes an object's traffic of one kind. The object's own label wins over its namespace's.
func bind(ws Waypoints, t traffic, namespace string, objectLabels, namespaceLabels map[string]string) Binding {
	from := objectLabels
	if from[labelUseWaypoint] == "" {
		from = namespaceLabels
	}
	name := from[labelUseWaypoint]
	if name == "" || name == useWaypointNone {
		return Binding{}
	}
	key := types.NamespacedName{Namespace: namespace, Name: name}
	if ns := from[labelUseWaypointNamespace]; ns != "" {
		key.Namespace = ns
	}
	facts, exists := ws[key]
	no := func(reason, format string, args ...any) *Condition {
		return &Condition{Type: ConditionWaypointBound, Reason: reason, Message: fmt.Sprintf(format, args...)}
	}
	switch {
	case !exists && t == trafficWorkload:
		return Binding{Condition: no("WaypointIsNotReady", "waypoint %s does not exist", key)}
	case !exists:
		return Binding{Waypoint: key, Condition: no("WaypointIsNotReady", "waypoint %s does not exist; connections are refused until it does", key)}
	case !facts.takes(t):
		return Binding{Condition: no("UnsupportedTrafficType", "waypoint %s takes %s traffic (label %s), not %s traffic", key, facts.For, labelWaypointFor, t)}
	case !facts.admits(key.Namespace, namespace, namespaceLabels):
		return Binding{Waypoint: key, Condition: no("AttachmentDenied", "waypoint %s does not admit namespace %s (allowedRoutes of its listener); connections are refused", key, namespace)}
	case !facts.Ready:
		return Binding{Waypoint: key, Attached: true, Condition: no("WaypointIsNotReady", "waypoint %s has no ready endpoint; connections are refused until it has", key)}
	default:
		return Binding{Waypoint: key, Attached: true, Condition: &Condition{Type: ConditionWaypointBound, Status: true,
			Reason: "WaypointAccepted", Message: fmt.Sprintf("Successfully attached to waypoint %s", key)}}
	}
}

// address is where ztunnels reach the waypoint: its Service.
func (b Binding) address(m Mesh) *mesh.GatewayAddress {
	if b.Waypoint.Name == "" {
		return nil
	}
	return &mesh.GatewayAddress{
		Hostname:  mesh.NamespacedHostname{Namespace: b.Waypoint.Namespace, Hostname: m.Hostname(b.Waypoint.Namespace, b.Waypoint.Name)},
		HBONEPort: waypointHBONEPort,
	}
}
