package waypoint

// The configuration's way in, in steps:
//  1. Each type's handler decodes what changed; what cannot be decoded is refused, and the resource stays as it was.
//  2. Listener, routes, clusters and endpoints are put together; a whole with all its parts replaces the one in force,
//     one that lacks a part waits for it while the old stays.
//
// Next: waypoint/serve.go, which reads one snapshot for each decision.

import (
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/fairlead-mesh/fairlead/internal/httproute"
	"github.com/fairlead-mesh/fairlead/internal/xds"
)

const typePrefix = "type.googleapis.com/"

// The types subscribed to, in the order they are asked for and best pushed.
const (
	clusterType  = typePrefix + "envoy.config.cluster.v3.Cluster"
	endpointType = typePrefix + "envoy.config.endpoint.v3.ClusterLoadAssignment"
	listenerType = typePrefix + "envoy.config.listener.v3.Listener"
	routeType    = typePrefix + "envoy.config.route.v3.RouteConfiguration"
)

// snapshot is a whole configuration. It never changes.
type snapshot struct {
	entrance  *entrance
	tables    map[string]*httproute.Table
	clusters  map[string]*cluster
	endpoints map[string][]*endpoint
}

// tableOf is the routes of an HTTP chain.
func (s *snapshot) tableOf(c *chain) *httproute.Table {
	if c.inline != nil {
		return c.inline
	}
	return s.tables[c.table]
}

// resources holds what was received, and the whole that is in force.
type resources struct {
	current atomic.Pointer[snapshot]
	// applied is called with each new whole.
	applied func(*snapshot)

	mu        sync.Mutex
	entrance  *entrance
	tables    map[string]*httproute.Table
	clusters  map[string]*cluster
	endpoints map[string][]*endpoint
	loads     map[string]*load
	raw       map[string]map[string]proto.Message
	// waiting says what the newest whole lacks; nil when it is in force.
	waiting error
}

func newResources(applied func(*snapshot)) *resources {
	return &resources{
		applied: applied,
		tables:  map[string]*httproute.Table{}, clusters: map[string]*cluster{}, endpoints: map[string][]*endpoint{},
		loads: map[string]*load{}, raw: map[string]map[string]proto.Message{},
	}
}

// subscribe makes the handlers of all types.
func (r *resources) subscribe(client *xds.Client) {
	client.Subscribe(clusterType, handler(r, func(name string, m *clusterv3.Cluster) error {
		c, err := decodeCluster(m)
		if err == nil && c != nil {
			r.clusters[name] = c
		}
		return err
	}, func(name string) { delete(r.clusters, name) }))
	client.Subscribe(endpointType, handler(r, func(name string, m *endpointv3.ClusterLoadAssignment) error {
		e, err := decodeEndpoints(m, r.load)
		if err == nil {
			r.endpoints[name] = e
		}
		return err
	}, func(name string) { delete(r.endpoints, name) }))
	client.Subscribe(listenerType, handler(r, func(name string, m *listenerv3.Listener) error {
		if name != mainListener {
			return nil
		}
		e, err := decodeListener(m)
		if err == nil {
			r.entrance = e
		}
		return err
	}, func(name string) {
		if name == mainListener {
			r.entrance = nil
		}
	}))
	client.Subscribe(routeType, handler(r, func(name string, m *routev3.RouteConfiguration) error {
		t, err := decodeRoutes(m)
		if err == nil {
			r.tables[name] = t
		}
		return err
	}, func(name string) { delete(r.tables, name) }))
}

// handler is the common part of the four: take what decodes, refuse the rest by name, then put the whole together.
func handler[M any, P interface {
	*M
	proto.Message
}](r *resources, set func(name string, m P) error, remove func(name string)) xds.Handler {
	typeURL := typePrefix + string(P(new(M)).ProtoReflect().Descriptor().FullName())
	return xds.HandlerFunc(func(updated []xds.Resource, removed []string) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		var errs []error
		for _, u := range updated {
			m := P(new(M))
			err := u.Body.UnmarshalTo(m)
			if err == nil {
				err = set(u.Name, m)
			}
			if err != nil {
				errs = append(errs, &xds.ResourceError{Name: u.Name, Err: err})
				continue
			}
			r.keepRaw(typeURL, u.Name, m)
		}
		for _, name := range removed {
			remove(name)
			delete(r.raw[typeURL], name)
		}
		r.assemble()
		return errors.Join(errs...)
	})
}

func (r *resources) keepRaw(typeURL, name string, m proto.Message) {
	if r.raw[typeURL] == nil {
		r.raw[typeURL] = map[string]proto.Message{}
	}
	r.raw[typeURL][name] = m
}

// load is the load of an endpoint, kept while the process runs: an address that comes back has its count.
func (r *resources) load(key string) *load {
	l := r.loads[key]
	if l == nil {
		l = &load{}
		r.loads[key] = l
	}
	return l
}

// assemble puts a new whole in force, or notes what it lacks. mu is held.
func (r *resources) assemble() {
	s := &snapshot{entrance: r.entrance, tables: maps.Clone(r.tables), clusters: maps.Clone(r.clusters), endpoints: maps.Clone(r.endpoints)}
	if r.waiting = s.check(); r.waiting != nil {
		return
	}
	r.forgetLoads()
	r.current.Store(s)
	if r.applied != nil {
		r.applied(s)
	}
}

// forgetLoads drops the counts of endpoints that are gone and idle.
func (r *resources) forgetLoads() {
	used := map[string]struct{}{}
	for _, list := range r.endpoints {
		for _, e := range list {
			used[e.key()] = struct{}{}
		}
	}
	for key, l := range r.loads {
		if _, ok := used[key]; !ok && l.active.Load() == 0 {
			delete(r.loads, key)
		}
	}
}

// check tells whether everything that is named is there.
func (s *snapshot) check() error {
	if s.entrance == nil {
		return fmt.Errorf("no listener %s", mainListener)
	}
	for _, c := range s.entrance.chains {
		if c.table != "" && s.tables[c.table] == nil {
			return fmt.Errorf("filter chain %q names route table %q, which is not there", c.name, c.table)
		}
		if err := s.checkClusters(c.name, c.clusters()); err != nil {
			return err
		}
		if c.table == "" {
			continue
		}
		if err := s.checkClusters(c.table, tableClusters(s.tables[c.table])); err != nil {
			return err
		}
	}
	for _, c := range s.clusters {
		if _, ok := s.endpoints[c.eds]; c.eds != "" && !ok {
			return fmt.Errorf("cluster %q names endpoints %q, which are not there", c.name, c.eds)
		}
	}
	return nil
}

func (s *snapshot) checkClusters(by string, names []string) error {
	for _, name := range names {
		if s.clusters[name] == nil {
			return fmt.Errorf("%q names cluster %q, which is not there", by, name)
		}
	}
	return nil
}

// status is nil when what was received last is in force.
func (r *resources) status() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.waiting
}

// dump is what was received, for people: by type and name, in protobuf's JSON.
func (r *resources) dump() map[string]any {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := map[string]any{}
	for typeURL, byName := range r.raw {
		list := map[string]any{}
		for name, m := range byName {
			body, err := protojson.Marshal(m)
			if err != nil {
				list[name] = err.Error()
				continue
			}
			list[name] = jsonText(body)
		}
		out[typeURL] = list
	}
	if r.waiting != nil {
		out["not_in_force"] = r.waiting.Error()
	}
	return out
}

// jsonText is JSON that is already encoded.
type jsonText []byte

func (t jsonText) MarshalJSON() ([]byte, error) { return t, nil }
