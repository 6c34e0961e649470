package istiod

// The whole graph, one stage a noun. An arrow is a function of istiod-lite/translate; what is in brackets is a table
// (istiod-lite/table) of finished values, so that a stage whose outputs are as they were ends the matter.
//
//	AuthorizationPolicy ─────────────────────────▶ [policies] ───────────┬─────────────▶ node proxies (Authorization)
//	PeerAuthentication ──────────────────────────▶ [policies] [peers] ───┤
//	Service, EndpointSlice ──▶ [backends] ─┬─────────────────────────────┤
//	Gateway, GatewayClass ─────────────────┴─────▶ [waypoints] ──┬───────┤
//	Service, Namespace ──────────────────────────────────────────┴─▶ [services] ──┐
//	Pod, Namespace, Node, [backends] [policies] [peers] [waypoints] ─▶ [workloads] ┴──▶ node proxies (Address)
//	[services] [workloads] HTTPRoute, GRPCRoute, AuthorizationPolicy ─▶ [configs] ────▶ each waypoint (CDS EDS RDS LDS)
//
// The steps of a change:
//  1. istiod-lite/source tells of it; note marks what it makes dirty (dirty.go).
//  2. Run waits a little for more of the same, then takes all that is dirty.
//  3. recompute runs the stages in the order above (stages.go, stages_waypoint.go); a stage whose table changed makes
//     dirty what depends on it.
//  4. push hands on what the tables say has changed, policies before the workloads that list them.
//
// Next: istiod-lite/translate/authorization.go

import (
	"context"
	"time"

	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/types"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/istiod-lite/push"
	"github.com/fairlead-mesh/fairlead/istiod-lite/source"
	"github.com/fairlead-mesh/fairlead/istiod-lite/status"
	"github.com/fairlead-mesh/fairlead/istiod-lite/table"
	"github.com/fairlead-mesh/fairlead/istiod-lite/translate"
)

const (
	// quiet is how long nothing must happen before a recompute; longest bounds the wait while things keep happening.
	quiet   = 5 * time.Millisecond
	longest = 40 * time.Millisecond
)

// name names a namespaced object.
type name = types.NamespacedName

// pipeline is the graph and its tables. One goroutine, Run's, owns the tables.
type pipeline struct {
	mesh    translate.Mesh
	log     *zap.Logger
	sources *source.Sources
	pusher  *push.Pusher
	board   *status.Board
	metrics *metrics
	// gateways is told of waypoints to deploy; nil where nothing can be deployed.
	gateways *deployments

	dirty *dirtySet

	policies  *table.Table[string, *mesh.Authorization]
	selectors *table.Table[name, translate.PolicySelector]
	// selectorsIn finds selector policies by their namespace.
	selectorsIn *table.Index[string, name, translate.PolicySelector]
	// peers has the namespaces with PeerAuthentications of their own; peerDefault is for the others. converted are the
	// keys of the policies that each namespace's were made into.
	peers       *table.Table[string, translate.PeerModes]
	peerDefault translate.PeerModes
	converted   map[string][]string
	backends    *table.Table[name, []translate.Backend]
	// backingPod and backingAddress find services by a pod, or an address without one, behind them.
	backingPod     *table.Index[name, name, []translate.Backend]
	backingAddress *table.Index[string, name, []translate.Backend]
	waypoints      translate.Waypoints
	services       *table.Table[mesh.NamespacedHostname, *mesh.Service]
	workloads      *table.Table[string, *mesh.Workload]
	// workloadsOf finds workloads by a service they are an endpoint of.
	workloadsOf *table.Index[mesh.NamespacedHostname, string, *mesh.Workload]
	// bare are the workloads made of addresses without a pod, by the service they are behind.
	bare map[name][]string
	// served and taken are the services and workloads attached to a waypoint.
	served   *table.Table[name, name]
	servedBy *table.Index[name, name, name]
	taken    *table.Table[string, name]
	takenBy  *table.Index[name, string, name]
	// configs are the waypoints configured; reported the objects each has said something of.
	configs  map[name]translate.WaypointMemory
	reported map[name]map[status.Object]struct{}
}

func newPipeline(m translate.Mesh, pusher *push.Pusher, metrics *metrics, log *zap.Logger) *pipeline {
	p := &pipeline{
		mesh: m, log: log, pusher: pusher, metrics: metrics, dirty: newDirtySet(),
		policies:  table.New[string, *mesh.Authorization](),
		selectors: table.New[name, translate.PolicySelector](),
		peers:     table.New[string, translate.PeerModes](),
		backends:  table.New[name, []translate.Backend](),
		waypoints: translate.Waypoints{},
		services:  table.New[mesh.NamespacedHostname, *mesh.Service](),
		workloads: table.New[string, *mesh.Workload](),
		served:    table.New[name, name](),
		taken:     table.New[string, name](),
		configs:   map[name]translate.WaypointMemory{},
		converted: map[string][]string{}, bare: map[name][]string{}, reported: map[name]map[status.Object]struct{}{},
	}
	strict := translate.StaticStrict(m)
	p.policies.Set(strict.Key(), strict)
	p.peerDefault, _ = translate.PeerAuthentication(m, nil, nil)
	p.selectorsIn = table.NewIndex(p.selectors, func(s translate.PolicySelector) []string { return []string{s.Namespace} })
	p.backingPod = table.NewIndex(p.backends, podsBehind)
	p.backingAddress = table.NewIndex(p.backends, addressesBehind)
	p.workloadsOf = table.NewIndex(p.workloads, servicesOf)
	p.servedBy = table.NewIndex(p.served, func(waypoint name) []name { return []name{waypoint} })
	p.takenBy = table.NewIndex(p.taken, func(waypoint name) []name { return []name{waypoint} })
	return p
}

// Run recomputes what is dirty until ctx ends. The sources must have been listed; everything in them is dirty at first.
// first is called when all of that has been pushed.
func (p *pipeline) Run(ctx context.Context, first func()) {
	p.noteEverything()
	p.recompute(p.dirty.take())
	first()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.dirty.wake:
		}
		if !settled(ctx, p.dirty.wake) {
			return
		}
		p.recompute(p.dirty.take())
	}
}

// settled waits until wake has been quiet for a little; false when ctx ended.
func settled(ctx context.Context, wake <-chan struct{}) bool {
	deadline := time.NewTimer(longest)
	defer deadline.Stop()
	pause := time.NewTimer(quiet)
	defer pause.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-deadline.C:
			return true
		case <-pause.C:
			return true
		case <-wake:
			pause.Reset(quiet)
		}
	}
}

// recompute runs the stages. Each takes what is dirty of its noun, and may make dirty what comes after it.
func (p *pipeline) recompute(d *dirty) {
	start := time.Now()
	p.authorizations(d)
	p.peerAuthentications(d)
	p.serviceBackends(d)
	p.waypointFacts(d)
	p.meshServices(d)
	p.podWorkloads(d)
	p.endpointWorkloads(d)
	p.push()
	p.waypointConfigs(d)
	p.metrics.recomputed(time.Since(start), p.workloads.Len(), p.services.Len(), p.policies.Len(), len(p.waypoints))
}

// push hands on the changes of the tables that node proxies are given.
func (p *pipeline) push() {
	policies, gonePolicies := p.policies.Drain()
	p.pusher.Authorizations(policies, gonePolicies)
	workloads, goneWorkloads := p.workloads.Drain()
	services, goneServices := p.services.Drain()
	p.pusher.Addresses(workloads, goneWorkloads, services, goneServices)
}
