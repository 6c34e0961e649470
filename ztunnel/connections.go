package ztunnel

// The live connections of this node's pods, in steps:
//  1. open registers a connection before its policies are checked, so that no change of policy can fall in between.
//  2. attach gives the means to cut it, once it carries bytes.
//  3. recheck, called for each new snapshot, cuts the connections that would not be let in any more.
//  4. end takes the connection out, counts it and writes its one line.

import (
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/accesslog"
	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

// direction is which side of a connection this proxy serves.
type direction uint8

const (
	outbound direction = iota
	inbound
)

func (d direction) String() string {
	if d == inbound {
		return "inbound"
	}
	return "outbound"
}

// The values of path.
const (
	pathHBONE    = "hbone"
	pathWaypoint = "waypoint"
	pathNode     = "node"
	pathPlain    = "plain"
)

// connections is the set of live connections.
type connections struct {
	access  *accesslog.Log
	metrics *metrics
	limits  Limits

	mu   sync.Mutex
	live map[*connection]struct{}
	// ports counts the source ports that clients of inbound connections use, by the pair of addresses.
	ports map[portKey]int
	empty chan struct{} // closed while live is empty
	moves int           // connections that came or went
}

// portKey is a client's end of a connection to one of a pod's ports.
type portKey struct{ client, local netip.AddrPort }

// connection is one connection of a pod, from its first moment to its log line.
type connection struct {
	set       *connections
	pod       *pod
	direction direction
	start     time.Time
	client    netip.AddrPort // the source's end
	asked     netip.AddrPort // the address the source asked for
	hop       netip.AddrPort // what is dialled for it
	hbone     string         // the address behind the tunnel

	source, destination *mesh.Workload // nil where the mesh knows none
	service             *mesh.Service
	serviceName         string // where service is nil and the peer has named it
	sourceID, destID    mesh.Identity
	mutualTLS           bool     // both identities are proven
	path                string   // as in the access log
	policy              string   // that decided
	dryRun              []string // policies that would have decided, were they enforced

	opened bool

	mu       sync.Mutex
	check    *authz.Connection     // what they are asked; nil where policies do not apply
	policies []*mesh.Authorization // that were asked last
	carrier  carrier               // once it carries bytes
	cutFor   *failure

	idle *idle // half closed, as reap saw it
}

func newConnections(access *accesslog.Log, m *metrics, limits Limits) *connections {
	empty := make(chan struct{})
	close(empty)
	return &connections{access: access, metrics: m, limits: limits, live: map[*connection]struct{}{}, ports: map[portKey]int{}, empty: empty}
}

// open registers a connection of a pod.
func (s *connections) open(p *pod, d direction, client, asked netip.AddrPort) *connection {
	c := &connection{set: s, pod: p, direction: d, start: time.Now(), client: client, asked: asked}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.add(c)
	return c
}

// add puts a connection in the set. The lock is held.
func (s *connections) add(c *connection) {
	if len(s.live) == 0 {
		s.empty = make(chan struct{})
	}
	s.live[c] = struct{}{}
	s.moves++
	c.pod.connections++
	if c.direction == inbound {
		s.ports[portKey{c.client, c.asked}]++
	}
}

// remove takes a connection out of the set. The lock is held.
func (s *connections) remove(c *connection) {
	delete(s.live, c)
	s.moves++
	c.pod.connections--
	s.forgetPort(c)
	if len(s.live) == 0 {
		close(s.empty)
	}
}

// moved is how many connections have come and gone so far, and how many there are.
func (s *connections) moved() (moves, live int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.moves, len(s.live)
}

// forgetPort takes out what open has noted of a connection's ends. The lock is held.
func (s *connections) forgetPort(c *connection) {
	if c.direction != inbound {
		return
	}
	key := portKey{c.client, c.asked}
	if s.ports[key]--; s.ports[key] <= 0 {
		delete(s.ports, key)
	}
}

// clientUses tells whether client has a live connection to local: the proxy cannot open one between the same ends.
func (s *connections) clientUses(client, local netip.AddrPort) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ports[portKey{client, local}] > 0
}

// authorize asks the policies that apply to the connection's pod now, and remembers the question for later snapshots.
// The snapshot is loaded after the question is remembered: of two that follow each other, recheck or this sees the later.
func (c *connection) authorize(store *state.Store, question authz.Connection) *failure {
	c.mu.Lock()
	c.check = &question
	c.mu.Unlock()
	snap := store.Load()
	self := c.pod.workload(snap)
	if self == nil {
		return fail(reasonNotSynced, "the pod was taken out of the mesh")
	}
	policies := snap.Policies(self)
	c.mu.Lock()
	c.policies = policies
	c.mu.Unlock()
	verdict := authz.Check(policies, question)
	c.policy, c.dryRun = verdict.Policy, verdict.DryRun
	if !verdict.Allowed {
		return denied(reasonDenied, verdict)
	}
	return nil
}

// establish counts the connection as opened: from here on it carries bytes.
func (c *connection) establish() {
	c.opened = true
	c.set.metrics.opened(c)
}

// attach gives the means to cut the connection and to read its byte counts. When it is to be cut already, by is at once.
func (c *connection) attach(by carrier) {
	c.mu.Lock()
	c.carrier = by
	already := c.cutFor
	c.mu.Unlock()
	if already != nil {
		by.Abort(already)
	}
}

// abort cuts the connection for a reason.
func (c *connection) abort(why *failure) {
	c.mu.Lock()
	if c.cutFor != nil {
		c.mu.Unlock()
		return
	}
	c.cutFor = why
	by := c.carrier
	c.mu.Unlock()
	if by != nil {
		by.Abort(why)
	}
}

// aborted is why the connection was cut, or nil.
func (c *connection) aborted() *failure {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.cutFor
}

// fail ends a connection that was not made.
func (c *connection) fail(f *failure) { c.end(f, 0, 0) }

// finish ends a connection that carried bytes: request and response are counted from the source's point of view.
func (c *connection) finish(r relay.Result, request, response int64) {
	var f *failure
	switch cutFor := c.aborted(); {
	case cutFor != nil:
		f = cutFor
	case r.Err != nil:
		f = &failure{reason: reasonReset, err: r.Err}
		if known := (*failure)(nil); errors.As(r.Err, &known) {
			f = known
		}
	}
	c.end(f, request, response)
}

// end takes the connection out of the set, counts it and logs it. It is called once.
func (c *connection) end(f *failure, request, response int64) {
	s := c.set
	s.mu.Lock()
	s.remove(c)
	s.mu.Unlock()
	s.metrics.ended(c, f, request, response)
	s.access.Write(c.record(f, request, response))
}

// record is the connection's line.
func (c *connection) record(f *failure, request, response int64) *accesslog.Record {
	r := &accesslog.Record{
		Source:      accesslog.Peer{Addr: c.client, Identity: c.sourceID.String()},
		Destination: accesslog.Peer{Addr: c.hop, Identity: c.destID.String()},
		HBONEAddr:   c.hbone,
		Service:     c.serviceHostname(),
		Direction:   c.direction.String(),
		Path:        c.path,
		Sent:        response,
		Received:    request,
		Duration:    time.Since(c.start),
		Flag:        reasonNone.flag(),
		Policy:      c.policy,
		DryRun:      c.dryRun,
	}
	if !r.Destination.Addr.IsValid() {
		r.Destination.Addr = c.asked
	}
	if c.source != nil {
		r.Source.Workload, r.Source.Namespace = c.source.Name, c.source.Namespace
	}
	if c.destination != nil {
		r.Destination.Workload, r.Destination.Namespace = c.destination.Name, c.destination.Namespace
	}
	if f != nil {
		r.Flag, r.Err = f.reason.flag(), f.Error()
		if f.policy != "" {
			r.Policy = f.policy
		}
	}
	return r
}

func (c *connection) serviceHostname() string {
	if c.service != nil {
		return c.service.Hostname
	}
	return c.serviceName
}

// recheck cuts the inbound connections that the policies of snap do not let in any more. A connection whose pod the
// snapshot does not know stays: nothing can be said about it.
func (s *connections) recheck(snap *state.Snapshot) {
	ofPod := map[*pod][]*mesh.Authorization{}
	for _, c := range s.list() {
		policies, known := ofPod[c.pod]
		if !known {
			self := c.pod.workload(snap)
			if self == nil {
				continue
			}
			policies = snap.Policies(self)
			ofPod[c.pod] = policies
		}
		if failed := c.reconsider(policies); failed != nil {
			c.abort(failed)
		}
	}
}

// reconsider asks policies unless they are the ones that were asked last.
func (c *connection) reconsider(policies []*mesh.Authorization) *failure {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.check == nil || slices.Equal(c.policies, policies) {
		return nil
	}
	c.policies = policies
	if verdict := authz.Check(policies, *c.check); !verdict.Allowed {
		return denied(reasonPolicyChanged, verdict)
	}
	return nil
}

func (s *connections) list() []*connection {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*connection, 0, len(s.live))
	for c := range s.live {
		all = append(all, c)
	}
	return all
}

// drained is closed while there are no connections.
func (s *connections) drained() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.empty
}
