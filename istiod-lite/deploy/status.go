package deploy

import (
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"
)

// Status is what the Gateway's status becomes: addresses, and the conditions Accepted and Programmed. svc and dep are
// what the informers have of the objects Ensure made, nil when there is none (yet). It is a pure function; now becomes
// the transition time of conditions that differ from the Gateway's present ones.
func Status(gw *gatewayv1.Gateway, svc *corev1.Service, dep *appsv1.Deployment, now metav1.Time) gatewayv1.GatewayStatus {
	s := *gw.Status.DeepCopy()
	s.Addresses = addresses(svc)
	programmed, reason, message := programmed(s.Addresses, dep)
	set := func(conditions *[]metav1.Condition, kind string, status bool, reason, message string) {
		c := metav1.Condition{Type: kind, Status: metav1.ConditionFalse, Reason: reason, Message: message,
			ObservedGeneration: gw.Generation, LastTransitionTime: now}
		if status {
			c.Status = metav1.ConditionTrue
		}
		meta.SetStatusCondition(conditions, c)
	}
	set(&s.Conditions, string(gatewayv1.GatewayConditionAccepted), true, string(gatewayv1.GatewayReasonAccepted), "the Gateway is a waypoint")
	set(&s.Conditions, string(gatewayv1.GatewayConditionProgrammed), programmed, reason, message)
	before := s.Listeners
	s.Listeners = nil
	for _, l := range gw.Spec.Listeners {
		ls := gatewayv1.ListenerStatus{Name: l.Name}
		for _, old := range before {
			if old.Name == l.Name {
				ls = old
			}
		}
		group := gatewayv1.Group(gatewayv1.GroupName)
		ls.SupportedKinds = []gatewayv1.RouteGroupKind{{Group: &group, Kind: "HTTPRoute"}, {Group: &group, Kind: "GRPCRoute"}}
		accepted := l.Protocol == "HBONE" && l.Port == hbonePort
		if accepted {
			set(&ls.Conditions, string(gatewayv1.ListenerConditionAccepted), true, string(gatewayv1.ListenerReasonAccepted), "takes the mesh's tunnels")
		} else {
			set(&ls.Conditions, string(gatewayv1.ListenerConditionAccepted), false, string(gatewayv1.ListenerReasonUnsupportedProtocol),
				"a waypoint's listener has protocol HBONE and port 15008")
		}
		set(&ls.Conditions, string(gatewayv1.ListenerConditionResolvedRefs), true, string(gatewayv1.ListenerReasonResolvedRefs), "there is nothing to resolve")
		set(&ls.Conditions, string(gatewayv1.ListenerConditionProgrammed), accepted && programmed, reason, message)
		s.Listeners = append(s.Listeners, ls)
	}
	return s
}

func addresses(svc *corev1.Service) []gatewayv1.GatewayStatusAddress {
	if svc == nil {
		return nil
	}
	kind := gatewayv1.IPAddressType
	ips := svc.Spec.ClusterIPs
	if len(ips) == 0 {
		ips = []string{svc.Spec.ClusterIP}
	}
	var out []gatewayv1.GatewayStatusAddress
	for _, ip := range ips {
		if ip != "" && ip != corev1.ClusterIPNone {
			out = append(out, gatewayv1.GatewayStatusAddress{Type: &kind, Value: ip})
		}
	}
	return out
}

func programmed(addresses []gatewayv1.GatewayStatusAddress, dep *appsv1.Deployment) (ok bool, reason, message string) {
	switch {
	case len(addresses) == 0:
		return false, string(gatewayv1.GatewayReasonAddressNotAssigned), "the waypoint's Service has no address yet"
	case dep == nil:
		return false, string(gatewayv1.GatewayReasonPending), "the waypoint's Deployment is not there yet"
	case dep.Status.ReadyReplicas == 0:
		return false, string(gatewayv1.GatewayReasonPending), "no pod of the waypoint is ready yet"
	default:
		return true, string(gatewayv1.GatewayReasonProgrammed), "the waypoint is ready at " + addresses[0].Value
	}
}
