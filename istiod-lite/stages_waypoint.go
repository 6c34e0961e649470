package istiod

import (
	"fmt"
	"maps"
	"reflect"

	"go.uber.org/zap"
	securityv1 "istio.io/client-go/pkg/apis/security/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	gatewayv1 "sigs.k8s.io/gateway-api/apis/v1"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/istiod-lite/deploy"
	"github.com/fairlead-mesh/fairlead/istiod-lite/status"
	"github.com/fairlead-mesh/fairlead/istiod-lite/table"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

// meshController is the controller of waypoint classes.
const meshController gatewayv1.GatewayController = "istio.io/mesh-controller"

// waypointFacts: Gateway, GatewayClass, [backends] → [waypoints], and what they say to services and workloads.
func (p *pipeline) waypointFacts(d *dirty) {
	if !d.gateways {
		return
	}
	next := translate.Waypoints{}
	for _, gw := range p.sources.Gateways.List() {
		if gw.Spec.GatewayClassName != translate.WaypointClass {
			continue
		}
		class, _ := p.sources.GatewayClasses.Get("", string(gw.Spec.GatewayClassName))
		backends, _ := p.backends.Get(nameOf(gw))
		next[nameOf(gw)] = translate.NewWaypointFacts(gw, class, len(backends) > 0)
		p.gatewayStatus(gw, len(backends) > 0)
	}
	p.classStatus()
	if reflect.DeepEqual(next, p.waypoints) {
		return
	}
	p.allServices(d)
	if !reflect.DeepEqual(withoutReadiness(next), withoutReadiness(p.waypoints)) {
		p.allPods(d)
	}
	p.waypoints, d.configs = next, true
}

// withoutReadiness is all of the waypoints that workloads depend on.
func withoutReadiness(ws translate.Waypoints) translate.Waypoints {
	out := maps.Clone(ws)
	for key, facts := range out {
		facts.Ready = false
		out[key] = facts
	}
	return out
}

// gatewayStatus reports on a waypoint: what was deployed for it or, where nothing is, whether one is running.
func (p *pipeline) gatewayStatus(gw *gatewayv1.Gateway, ready bool) {
	want := runningStatus(gw, ready)
	if p.gateways != nil {
		var svc *corev1.Service
		var dep *appsv1.Deployment
		if s, ok := p.sources.Services.Get(gw.Namespace, gw.Name); ok {
			svc = s
		}
		if o, ok := p.sources.Deployments.Get(gw.Namespace, gw.Name); ok {
			dep = o
		}
		next := deploy.Status(gw, svc, dep, metav1.Now())
		want = status.Desired{Gateway: &next}
	}
	p.board.Set("gateway", status.Object{Kind: "Gateway", Namespace: gw.Namespace, Name: gw.Name}, want)
}

// runningStatus is the status of a waypoint that somebody else runs.
func runningStatus(gw *gatewayv1.Gateway, ready bool) status.Desired {
	programmed := status.Condition{Type: string(gatewayv1.GatewayConditionProgrammed), Status: true, Generation: gw.Generation,
		Reason: string(gatewayv1.GatewayReasonProgrammed), Message: "a waypoint is running"}
	if !ready {
		programmed.Status, programmed.Reason = false, string(gatewayv1.GatewayReasonPending)
		programmed.Message = fmt.Sprintf("no endpoint of service %s/%s is ready", gw.Namespace, gw.Name)
	}
	return status.Desired{Conditions: []status.Condition{{Type: string(gatewayv1.GatewayConditionAccepted), Status: true, Generation: gw.Generation,
		Reason: string(gatewayv1.GatewayReasonAccepted), Message: "the Gateway is a waypoint"}, programmed}}
}

func (p *pipeline) classStatus() {
	for _, class := range p.sources.GatewayClasses.List() {
		if class.Spec.ControllerName != meshController {
			continue
		}
		p.board.Set("class", status.Object{Kind: "GatewayClass", Name: class.Name}, desired(class.Generation, &translate.Condition{
			Type: string(gatewayv1.GatewayClassConditionStatusAccepted), Status: true,
			Reason: string(gatewayv1.GatewayClassReasonAccepted), Message: "Gateways of this class are waypoints",
		}))
	}
}

// waypointConfigs: [services], [workloads], routes and policies → the configuration of each waypoint.
func (p *pipeline) waypointConfigs(d *dirty) {
	if !d.configs {
		return
	}
	for key := range p.configs {
		if _, still := p.waypoints[key]; !still {
			p.pusher.DropWaypoint(key)
			p.report(key, nil)
			delete(p.configs, key)
		}
	}
	for key := range p.waypoints {
		gw, ok := p.sources.Gateways.Get(key.Namespace, key.Name)
		if !ok {
			continue
		}
		out := translate.Waypoint(p.waypointInput(gw))
		p.configs[key] = out.Memory
		p.report(key, out.Conditions)
		resources, err := out.Resources()
		if err != nil {
			p.log.Error("encode waypoint configuration; what was pushed before stays", zap.Stringer("waypoint", key), zap.Error(err))
			continue
		}
		p.pusher.Waypoint(key, resources)
	}
	p.reportUnattached()
}

func (p *pipeline) waypointInput(gw *gatewayv1.Gateway) translate.WaypointInput {
	key := nameOf(gw)
	in := translate.WaypointInput{
		Gateway: gw, TrustDomain: p.mesh.TrustDomain, RootNamespace: p.mesh.RootNamespace,
		HTTPRoutes: p.sources.HTTPRoutes.List(), GRPCRoutes: p.sources.GRPCRoutes.List(),
		ReferenceGrants: p.sources.ReferenceGrants.List(), Previous: p.configs[key],
	}
	for _, policy := range p.sources.AuthorizationPolicys.List() {
		if targets(policy) {
			in.Policies = append(in.Policies, policy)
		}
	}
	for _, service := range p.servedBy.Keys(key) {
		if s, ok := p.waypointService(service); ok {
			in.Services = append(in.Services, s)
		}
	}
	for _, service := range translate.WaypointBackends(in.HTTPRoutes, in.GRPCRoutes) {
		if s, ok := p.waypointService(service); ok {
			in.Backends = append(in.Backends, s)
		}
	}
	for _, uid := range p.takenBy.Keys(key) {
		if w, ok := p.workloads.Get(uid); ok {
			in.Workloads = append(in.Workloads, w)
		}
	}
	return in
}

func (p *pipeline) waypointService(key name) (translate.WaypointService, bool) {
	service, ok := p.services.Get(mesh.NamespacedHostname{Namespace: key.Namespace, Hostname: p.mesh.Hostname(key.Namespace, key.Name)})
	if !ok {
		return translate.WaypointService{}, false
	}
	object, _ := p.sources.Services.Get(key.Namespace, key.Name)
	return translate.WaypointService{Service: service, Object: object, Endpoints: table.Sorted(p.workloadsOf, service.Key())}, true
}

// report puts on the board what a waypoint says of the objects it is configured with, and takes back what it said of
// others before.
func (p *pipeline) report(waypoint name, conditions []translate.WaypointCondition) {
	producer := "waypoint " + waypoint.String()
	said := map[status.Object]status.Desired{}
	for _, c := range conditions {
		o := status.Object{Kind: c.Kind, Namespace: c.Object.Namespace, Name: c.Object.Name}
		d := said[o]
		d.Conditions = append(d.Conditions, status.Condition{
			Parent: c.Parent, Generation: c.Generation, Type: c.Type, Status: c.Status, Reason: c.Reason, Message: c.Message,
		})
		said[o] = d
	}
	for o := range p.reported[waypoint] {
		if _, still := said[o]; !still {
			p.board.Set(producer, o, status.Desired{})
		}
	}
	now := make(map[status.Object]struct{}, len(said))
	for o, d := range said {
		p.board.Set(producer, o, d)
		now[o] = struct{}{}
	}
	p.reported[waypoint] = now
	if len(now) == 0 {
		delete(p.reported, waypoint)
	}
}

// reportUnattached says of each policy with targets that no waypoint took why none did.
func (p *pipeline) reportUnattached() {
	for _, policy := range p.sources.AuthorizationPolicys.List() {
		o := status.Object{Kind: "AuthorizationPolicy", Namespace: policy.Namespace, Name: policy.Name}
		attached := !targets(policy)
		for _, objects := range p.reported {
			_, here := objects[o]
			attached = attached || here
		}
		if attached {
			p.board.Set("targets", o, status.Desired{})
			continue
		}
		p.board.Set("targets", o, desired(policy.Generation, p.unattached(policy)))
	}
}

func (p *pipeline) unattached(policy *securityv1.AuthorizationPolicy) *translate.Condition {
	c := &translate.Condition{Type: "WaypointAccepted", Reason: "TargetNotFound"}
	refs := policy.Spec.GetTargetRefs()
	if ref := policy.Spec.GetTargetRef(); ref != nil {
		refs = append(refs, ref)
	}
	for _, ref := range refs {
		exists := false
		switch ref.GetKind() {
		case "Service":
			_, exists = p.sources.Services.Get(policy.Namespace, ref.GetName())
		case "Gateway":
			_, exists = p.sources.Gateways.Get(policy.Namespace, ref.GetName())
		case "GatewayClass":
			_, exists = p.sources.GatewayClasses.Get("", ref.GetName())
		}
		if exists {
			c.Reason, c.Message = "AncestorNotBound", fmt.Sprintf("%s %s is not served by a waypoint", ref.GetKind(), ref.GetName())
			return c
		}
		c.Message = fmt.Sprintf("%s %s does not exist", ref.GetKind(), ref.GetName())
	}
	return c
}

func targets(policy *securityv1.AuthorizationPolicy) bool {
	return policy.Spec.GetTargetRef() != nil || len(policy.Spec.GetTargetRefs()) > 0
}
