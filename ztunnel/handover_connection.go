package ztunnel

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/relay"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

// connectionState is a connection as a value: what its line will say, and what policies are asked.
type connectionState struct {
	Pod                string
	Direction          direction
	Start              time.Time
	Client, Asked, Hop netip.AddrPort
	HBONE              string `json:",omitempty"`

	Source, Destination *workloadState `json:",omitempty"`
	Service             *mesh.Service  `json:",omitempty"`
	ServiceName         string         `json:",omitempty"`
	SourceID, DestID    mesh.Identity
	MutualTLS           bool
	Path, Policy        string
	DryRun              []string          `json:",omitempty"`
	Check               *authz.Connection `json:",omitempty"`
}

// export is the connection's state. Only connections that carry bytes have one: they do not change.
func (c *connection) export() connectionState {
	st := connectionState{Pod: c.pod.UID, Direction: c.direction, Start: c.start, Client: c.client, Asked: c.asked, Hop: c.hop,
		HBONE: c.hbone, Source: exportWorkload(c.source), Destination: exportWorkload(c.destination), Service: c.service,
		ServiceName: c.serviceName, SourceID: c.sourceID, DestID: c.destID, MutualTLS: c.mutualTLS, Path: c.path,
		Policy: c.policy, DryRun: c.dryRun}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.check != nil {
		check := *c.check
		st.Check = &check
	}
	return st
}

// workloadState is what logs and metrics say of a workload.
type workloadState struct {
	UID, Name, Namespace, TrustDomain, ServiceAccount, ClusterID string
	CanonicalName, CanonicalRevision, WorkloadName, WorkloadType string
	Locality                                                     mesh.Locality
}

func exportWorkload(w *mesh.Workload) *workloadState {
	if w == nil {
		return nil
	}
	return &workloadState{UID: w.UID, Name: w.Name, Namespace: w.Namespace, TrustDomain: w.TrustDomain,
		ServiceAccount: w.ServiceAccount, ClusterID: w.ClusterID, CanonicalName: w.CanonicalName,
		CanonicalRevision: w.CanonicalRevision, WorkloadName: w.WorkloadName, WorkloadType: w.WorkloadType, Locality: w.Locality}
}

// workload is the workload as the snapshot has it, whose pointer the series of metrics go by, or else as it was told.
func (st *workloadState) workload(snap *state.Snapshot) *mesh.Workload {
	if st == nil {
		return nil
	}
	if known := snap.Workload(st.UID); known != nil {
		return known
	}
	return &mesh.Workload{UID: st.UID, Name: st.Name, Namespace: st.Namespace, TrustDomain: st.TrustDomain,
		ServiceAccount: st.ServiceAccount, ClusterID: st.ClusterID, CanonicalName: st.CanonicalName,
		CanonicalRevision: st.CanonicalRevision, WorkloadName: st.WorkloadName, WorkloadType: st.WorkloadType, Locality: st.Locality}
}

// adopt makes a connection of another process's state. It counts from resume on.
func (p *Proxy) adopt(st *connectionState) (*connection, error) {
	pod := p.pods.get(st.Pod)
	if pod == nil || st.Direction > inbound {
		return nil, fmt.Errorf("pod %s is not served here", st.Pod)
	}
	snap := p.store.Load()
	c := &connection{set: p.connections, pod: pod, direction: st.Direction, start: st.Start, client: st.Client, asked: st.Asked,
		hop: st.Hop, hbone: st.HBONE, source: st.Source.workload(snap), destination: st.Destination.workload(snap), service: st.Service,
		serviceName: st.ServiceName, sourceID: st.SourceID, destID: st.DestID, mutualTLS: st.MutualTLS, path: st.Path,
		policy: st.Policy, dryRun: st.DryRun}
	if st.Check != nil {
		check := *st.Check
		c.check = &check
	}
	if c.service != nil {
		if known := snap.Service(c.service.Key()); known != nil {
			c.service = known
		}
	}
	return c, nil
}

// resume registers a connection that another process has opened. It counts as opened by this one too, so that opened less
// closed is what is open in each process.
func (s *connections) resume(c *connection) {
	s.mu.Lock()
	s.add(c)
	s.mu.Unlock()
	c.establish()
}

// forget takes a connection out that another process has taken over: its end is told there.
func (s *connections) forget(c *connection) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(c)
}

// byCarrier is the connections that carry bytes, by what carries them.
func (s *connections) byCarrier() map[carrier][]*connection {
	by := map[carrier][]*connection{}
	for _, c := range s.list() {
		c.mu.Lock()
		if c.carrier != nil {
			by[c.carrier] = append(by[c.carrier], c)
		}
		c.mu.Unlock()
	}
	return by
}

// finishStream ends a connection that a tunnel carried.
func (c *connection) finishStream(r relay.Result) {
	if c.direction == inbound {
		c.finish(r, r.Received, r.Sent)
		return
	}
	c.finish(r, r.Sent, r.Received)
}

// finishRelay ends the connections, one or both sides of it, that a relay carried. Who cut one has cut the others.
func finishRelay(conns []*connection, r relay.Result) {
	for _, cut := range conns {
		if why := cut.aborted(); why != nil {
			for _, c := range conns {
				c.abort(why)
			}
			break
		}
	}
	for _, c := range conns {
		c.finish(r, r.Sent, r.Received)
	}
}
