package status

import (
	"cmp"
	"reflect"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	istiometa "istio.io/api/meta/v1alpha1"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// routeController names this control plane in the parents of a route's status.
const routeController gatewayv1.GatewayController = "istio.io/gateway-controller"

// The condition types that are written here; others on the same object are left alone.
var (
	policyTypes  = []string{"ZtunnelAccepted", "WaypointAccepted"}
	serviceTypes = []string{"istio.io/WaypointBound"}
	gatewayTypes = []string{string(gatewayv1.GatewayConditionAccepted), string(gatewayv1.GatewayConditionProgrammed)}
	classTypes   = []string{string(gatewayv1.GatewayClassConditionStatusAccepted)}
)

// Condition is one condition an object is to have.
type Condition struct {
	// Parent is the parentRef of a route that the condition belongs to; nil for other kinds.
	Parent     *gatewayv1.ParentReference
	Generation int64
	Type       string
	Status     bool
	Reason     string
	Message    string
}

// apply makes obj's status say what is wanted, and tells whether that changed it.
func apply(obj runtime.Object, want Desired, now time.Time) bool {
	switch o := obj.(type) {
	case *securityv1.AuthorizationPolicy:
		return applyIstio(&o.Status, policyTypes, want.Conditions, now)
	case *corev1.Service:
		return applyKubernetes(&o.Status.Conditions, serviceTypes, want.Conditions, now)
	case *gatewayv1.GatewayClass:
		return applyKubernetes(&o.Status.Conditions, classTypes, want.Conditions, now)
	case *gatewayv1.HTTPRoute:
		return applyRoute(&o.Status.RouteStatus, want.Conditions, now)
	case *gatewayv1.GRPCRoute:
		return applyRoute(&o.Status.RouteStatus, want.Conditions, now)
	case *gatewayv1.Gateway:
		if want.Gateway == nil {
			return applyKubernetes(&o.Status.Conditions, gatewayTypes, want.Conditions, now)
		}
		if reflect.DeepEqual(o.Status, *want.Gateway) {
			return false
		}
		o.Status = *want.Gateway.DeepCopy()
		return true
	default:
		return false
	}
}

func applyIstio(s *istiometa.IstioStatus, own []string, want []Condition, now time.Time) bool {
	var next []*istiometa.IstioCondition
	for _, c := range s.Conditions {
		if !slices.Contains(own, c.GetType()) {
			next = append(next, c)
		}
	}
	var generation int64
	for _, w := range byType(want) {
		c := &istiometa.IstioCondition{
			Type: w.Type, Status: string(statusText(w.Status)), Reason: w.Reason, Message: w.Message,
			ObservedGeneration: w.Generation, LastTransitionTime: timestamppb.New(now),
		}
		for _, old := range s.Conditions {
			if old.GetType() == c.Type && old.GetStatus() == c.Status && old.GetLastTransitionTime() != nil {
				c.LastTransitionTime = old.LastTransitionTime
			}
		}
		generation = max(generation, w.Generation)
		next = append(next, c)
	}
	if generation == 0 {
		generation = s.ObservedGeneration
	}
	if s.ObservedGeneration == generation && slices.EqualFunc(s.Conditions, next, func(a, b *istiometa.IstioCondition) bool { return proto.Equal(a, b) }) {
		return false
	}
	s.Conditions, s.ObservedGeneration = next, generation
	return true
}

func applyKubernetes(current *[]metav1.Condition, own []string, want []Condition, now time.Time) bool {
	changed := false
	for _, t := range own {
		if !slices.ContainsFunc(want, func(w Condition) bool { return w.Type == t }) {
			changed = meta.RemoveStatusCondition(current, t) || changed
		}
	}
	for _, w := range byType(want) {
		changed = meta.SetStatusCondition(current, metav1.Condition{
			Type: w.Type, Status: statusText(w.Status), Reason: w.Reason, Message: w.Message,
			ObservedGeneration: w.Generation, LastTransitionTime: metav1.NewTime(now.Truncate(time.Second)),
		}) || changed
	}
	return changed
}

// applyRoute writes the parents that are this control plane's and leaves other controllers' alone.
func applyRoute(s *gatewayv1.RouteStatus, want []Condition, now time.Time) bool {
	next := []gatewayv1.RouteParentStatus{} // the API wants a list, also an empty one
	for _, p := range s.Parents {
		if p.ControllerName != routeController {
			next = append(next, p)
		}
	}
	for _, w := range want {
		if w.Parent == nil {
			continue
		}
		same := func(p gatewayv1.RouteParentStatus) bool {
			return p.ControllerName == routeController && reflect.DeepEqual(p.ParentRef, *w.Parent)
		}
		at := slices.IndexFunc(next, same)
		if at < 0 {
			at = len(next)
			parent := gatewayv1.RouteParentStatus{ParentRef: *w.Parent, ControllerName: routeController}
			if old := slices.IndexFunc(s.Parents, same); old >= 0 {
				parent = *s.Parents[old].DeepCopy()
			}
			next = append(next, parent)
		}
		meta.SetStatusCondition(&next[at].Conditions, metav1.Condition{
			Type: w.Type, Status: statusText(w.Status), Reason: w.Reason, Message: w.Message,
			ObservedGeneration: w.Generation, LastTransitionTime: metav1.NewTime(now.Truncate(time.Second)),
		})
	}
	if len(next) == len(s.Parents) && (len(next) == 0 || reflect.DeepEqual(next, s.Parents)) {
		return false
	}
	s.Parents = next
	return true
}

// byType has one condition a type, in the order of types: where two producers disagree, what is wrong is said.
func byType(all []Condition) []Condition {
	sorted := slices.Clone(all)
	slices.SortStableFunc(sorted, func(a, b Condition) int {
		if a.Type != b.Type {
			return cmp.Compare(a.Type, b.Type)
		}
		if a.Status != b.Status {
			if a.Status {
				return 1
			}
			return -1
		}
		return cmp.Compare(a.Message, b.Message)
	})
	return slices.CompactFunc(sorted, func(a, b Condition) bool { return a.Type == b.Type })
}

func statusText(ok bool) metav1.ConditionStatus {
	if ok {
		return metav1.ConditionTrue
	}
	return metav1.ConditionFalse
}
