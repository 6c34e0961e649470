package ztunnel

import (
	"cmp"
	"encoding/base64"
	"encoding/pem"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/fairlead-mesh/fairlead/internal/identity"
	"github.com/fairlead-mesh/fairlead/internal/mesh"
	"github.com/fairlead-mesh/fairlead/internal/state"
)

// The types below are the shape of /config_dump that istioctl and Kiali read, as Istio's ztunnel writes it.

type dump struct {
	Workloads     []dumpWorkload     `json:"workloads"`
	Services      []dumpService      `json:"services"`
	Policies      []dumpPolicy       `json:"policies"`
	Certificates  []dumpCertificates `json:"certificates"`
	WorkloadState map[string]dumpPod `json:"workloadState"`
	Config        dumpConfig         `json:"config"`
}

type dumpWorkload struct {
	UID                   string         `json:"uid"`
	WorkloadIPs           []string       `json:"workloadIps"`
	Waypoint              *dumpGateway   `json:"waypoint,omitempty"`
	NetworkGateway        *dumpGateway   `json:"networkGateway,omitempty"`
	Protocol              string         `json:"protocol"`
	Name                  string         `json:"name"`
	Namespace             string         `json:"namespace"`
	ServiceAccount        string         `json:"serviceAccount"`
	WorkloadName          string         `json:"workloadName"`
	WorkloadType          string         `json:"workloadType"`
	CanonicalName         string         `json:"canonicalName"`
	CanonicalRevision     string         `json:"canonicalRevision"`
	ClusterID             string         `json:"clusterId"`
	TrustDomain           string         `json:"trustDomain,omitempty"`
	Locality              dumpLocality   `json:"locality"`
	Node                  string         `json:"node"`
	Network               string         `json:"network,omitempty"`
	Status                string         `json:"status"`
	Hostname              string         `json:"hostname,omitempty"`
	ApplicationTunnel     *dumpAppTunnel `json:"applicationTunnel,omitempty"`
	NativeTunnel          bool           `json:"nativeTunnel,omitempty"`
	Capacity              uint32         `json:"capacity"`
	AuthorizationPolicies []string       `json:"authorizationPolicies,omitempty"`
}

type dumpLocality struct {
	Region  string `json:"region,omitempty"`
	Zone    string `json:"zone,omitempty"`
	Subzone string `json:"subzone,omitempty"`
}

type dumpAppTunnel struct {
	Protocol string `json:"protocol"`
	Port     uint16 `json:"port,omitempty"`
}

type dumpGateway struct {
	Destination   string `json:"destination"`
	HBONEMTLSPort uint16 `json:"hboneMtlsPort"`
}

type dumpService struct {
	Name            string                  `json:"name"`
	Namespace       string                  `json:"namespace"`
	Hostname        string                  `json:"hostname"`
	VIPs            []string                `json:"vips"`
	Ports           map[string]uint16       `json:"ports"`
	Endpoints       map[string]dumpEndpoint `json:"endpoints"`
	SubjectAltNames []string                `json:"subjectAltNames,omitempty"`
	Waypoint        *dumpGateway            `json:"waypoint,omitempty"`
	LoadBalancer    *dumpLoadBalancer       `json:"loadBalancer,omitempty"`
	IPFamilies      string                  `json:"ipFamilies,omitempty"`
}

type dumpEndpoint struct {
	WorkloadUID string            `json:"workloadUid"`
	Service     string            `json:"service"`
	Port        map[string]uint16 `json:"port"`
	Status      string            `json:"status"`
}

type dumpLoadBalancer struct {
	Mode               string   `json:"mode"`
	RoutingPreferences []string `json:"routingPreferences"`
	HealthPolicy       string   `json:"healthPolicy"`
}

type dumpPolicy struct {
	Name      string          `json:"name"`
	Namespace string          `json:"namespace"`
	Scope     string          `json:"scope"`
	Action    string          `json:"action"`
	DryRun    bool            `json:"dryRun,omitempty"`
	Rules     [][][]dumpMatch `json:"rules"`
}

type dumpMatch struct {
	Namespaces          []map[string]any     `json:"namespaces,omitempty"`
	NotNamespaces       []map[string]any     `json:"notNamespaces,omitempty"`
	Principals          []map[string]any     `json:"principals,omitempty"`
	NotPrincipals       []map[string]any     `json:"notPrincipals,omitempty"`
	ServiceAccounts     []dumpServiceAccount `json:"serviceAccounts,omitempty"`
	NotServiceAccounts  []dumpServiceAccount `json:"notServiceAccounts,omitempty"`
	SourceIPs           []netip.Prefix       `json:"sourceIps,omitempty"`
	NotSourceIPs        []netip.Prefix       `json:"notSourceIps,omitempty"`
	DestinationIPs      []netip.Prefix       `json:"destinationIps,omitempty"`
	NotDestinationIPs   []netip.Prefix       `json:"notDestinationIps,omitempty"`
	DestinationPorts    []uint16             `json:"destinationPorts,omitempty"`
	NotDestinationPorts []uint16             `json:"notDestinationPorts,omitempty"`
}

type dumpServiceAccount struct {
	Namespace      string `json:"namespace"`
	ServiceAccount string `json:"serviceAccount"`
}

type dumpCertificates struct {
	Identity  string            `json:"identity"`
	State     string            `json:"state"`
	CertChain []dumpCertificate `json:"certChain"`
}

type dumpCertificate struct {
	PEM            string `json:"pem"`
	SerialNumber   string `json:"serialNumber"`
	ValidFrom      string `json:"validFrom"`
	ExpirationTime string `json:"expirationTime"`
}

type dumpPod struct {
	State       string          `json:"state"`
	Info        dumpPodInfo     `json:"info"`
	Connections dumpConnections `json:"connections"`
}

type dumpPodInfo struct {
	Name           string `json:"name"`
	Namespace      string `json:"namespace"`
	TrustDomain    string `json:"trustDomain"`
	ServiceAccount string `json:"serviceAccount"`
}

type dumpConnections struct {
	Inbound  []dumpConnection `json:"inbound"`
	Outbound []dumpConnection `json:"outbound"`
}

type dumpConnection struct {
	Src         string `json:"src"`
	OriginalDst string `json:"originalDst"`
	ActualDst   string `json:"actualDst"`
	Protocol    string `json:"protocol"`
	Identity    string `json:"identity,omitempty"`
	Sent        int64  `json:"bytesSent"`
	Received    int64  `json:"bytesRecv"`
	Age         string `json:"age"`
}

type dumpConfig struct {
	LocalNode   string `json:"localNode"`
	ClusterID   string `json:"clusterId"`
	Network     string `json:"network"`
	TrustDomain string `json:"trustDomain"`
	XDSAddress  string `json:"xdsAddress"`
	CAAddress   string `json:"caAddress"`
	FakeCA      bool   `json:"fakeCa"`
}

// dump describes everything the proxy knows at this moment.
func (p *Proxy) dump() dump {
	snap := p.store.Load()
	d := dump{
		Workloads: []dumpWorkload{}, Services: []dumpService{}, Policies: []dumpPolicy{}, Certificates: []dumpCertificates{},
		WorkloadState: map[string]dumpPod{},
		Config: dumpConfig{
			LocalNode: p.cfg.NodeName, ClusterID: p.cfg.ClusterID, Network: p.cfg.Network, TrustDomain: p.cfg.TrustDomain,
			XDSAddress: p.cfg.XDS.Address, CAAddress: p.cfg.CA.Address, FakeCA: p.cfg.FakeCA,
		},
	}
	for _, w := range snap.AllWorkloads() {
		d.Workloads = append(d.Workloads, describeWorkload(w))
	}
	for _, s := range snap.AllServices() {
		d.Services = append(d.Services, describeService(snap, s))
	}
	for _, a := range snap.AllPolicies() {
		d.Policies = append(d.Policies, describePolicy(a))
	}
	for _, s := range p.certs.All() {
		d.Certificates = append(d.Certificates, describeCertificates(s))
	}
	slices.SortFunc(d.Certificates, func(a, b dumpCertificates) int { return cmp.Compare(a.Identity, b.Identity) })
	p.describePods(d.WorkloadState)
	return d
}

// describePods fills in the pods and their live connections, by pod uid.
func (p *Proxy) describePods(out map[string]dumpPod) {
	for _, pod := range p.pods.list() {
		out[pod.UID] = dumpPod{
			State: "Up",
			Info: dumpPodInfo{
				Name: pod.Name, Namespace: pod.Namespace, TrustDomain: pod.identity.TrustDomain, ServiceAccount: pod.ServiceAccount,
			},
			Connections: dumpConnections{Inbound: []dumpConnection{}, Outbound: []dumpConnection{}},
		}
	}
	for _, c := range p.connections.list() {
		state, ok := out[c.pod.UID]
		line, live := c.describe()
		if !ok || !live {
			continue
		}
		if c.direction == inbound {
			state.Connections.Inbound = append(state.Connections.Inbound, line)
		} else {
			state.Connections.Outbound = append(state.Connections.Outbound, line)
		}
		out[c.pod.UID] = state
	}
}

// describe is one live connection; false while it is still being made.
func (c *connection) describe() (dumpConnection, bool) {
	c.mu.Lock()
	by := c.carrier
	c.mu.Unlock()
	if by == nil {
		return dumpConnection{}, false
	}
	line := dumpConnection{
		Src: c.client.String(), OriginalDst: c.asked.String(), ActualDst: c.hop.String(), Protocol: "TCP",
		Age: time.Since(c.start).Truncate(time.Millisecond).String(),
	}
	// Both counts are seen from the first end: the application's for outbound and plaintext, the tunnel's for inbound.
	line.Received, line.Sent = by.Counters()
	if c.direction == inbound && c.path == pathHBONE {
		line.Received, line.Sent = line.Sent, line.Received
	}
	if c.path == pathHBONE || c.path == pathWaypoint {
		line.Protocol = "HBONE"
	}
	if c.direction == inbound {
		line.Identity = c.sourceID.String()
		line.OriginalDst = c.serviceHostname()
	} else {
		line.Identity = c.destID.String()
	}
	return line, true
}

func describeWorkload(w *mesh.Workload) dumpWorkload {
	d := dumpWorkload{
		UID: w.UID, WorkloadIPs: []string{}, Waypoint: describeGateway(w.Waypoint), NetworkGateway: describeGateway(w.NetworkGateway),
		Protocol: w.Protocol.String(), Name: w.Name, Namespace: w.Namespace, ServiceAccount: w.ServiceAccount,
		WorkloadName: w.WorkloadName, WorkloadType: w.WorkloadType, CanonicalName: w.CanonicalName,
		CanonicalRevision: w.CanonicalRevision, ClusterID: w.ClusterID, TrustDomain: w.TrustDomain,
		Locality: dumpLocality{w.Locality.Region, w.Locality.Zone, w.Locality.Subzone},
		Node:     w.Node, Network: w.Network, Status: health(w.Healthy), Hostname: w.Hostname, NativeTunnel: w.NativeTunnel,
		Capacity: max(1, w.Capacity), AuthorizationPolicies: w.Policies,
	}
	for _, a := range w.Addresses {
		d.WorkloadIPs = append(d.WorkloadIPs, a.String())
	}
	if w.ApplicationProto == mesh.ApplicationProxy {
		d.ApplicationTunnel = &dumpAppTunnel{Protocol: "PROXY", Port: w.ApplicationPort}
	}
	return d
}

func health(healthy bool) string {
	if healthy {
		return "Healthy"
	}
	return "Unhealthy"
}

func describeGateway(g *mesh.GatewayAddress) *dumpGateway {
	if g == nil {
		return nil
	}
	if g.Hostname != (mesh.NamespacedHostname{}) {
		return &dumpGateway{Destination: g.Hostname.String(), HBONEMTLSPort: g.HBONEPort}
	}
	return &dumpGateway{Destination: describeAddress(g.Address), HBONEMTLSPort: g.HBONEPort}
}

func describeAddress(a mesh.NetworkAddress) string { return a.Network + "/" + a.Address.String() }

func describeService(snap *state.Snapshot, s *mesh.Service) dumpService {
	d := dumpService{
		Name: s.Name, Namespace: s.Namespace, Hostname: s.Hostname, VIPs: []string{}, Ports: describePorts(s.Ports),
		Endpoints: map[string]dumpEndpoint{}, SubjectAltNames: s.SubjectAltNames, Waypoint: describeGateway(s.Waypoint),
		LoadBalancer: describeLoadBalancing(s.LoadBalancing),
	}
	four, six := false, false
	for _, a := range s.Addresses {
		d.VIPs = append(d.VIPs, describeAddress(a))
		four, six = four || a.Address.Is4(), six || a.Address.Is6()
	}
	switch {
	case four && six:
		d.IPFamilies = "Dual"
	case four:
		d.IPFamilies = "IPv4"
	case six:
		d.IPFamilies = "IPv6"
	}
	for _, e := range snap.Endpoints(s.Key()) {
		d.Endpoints[e.Workload.UID] = dumpEndpoint{
			WorkloadUID: e.Workload.UID, Service: s.Key().String(), Port: describePorts(e.Ports), Status: health(e.Workload.Healthy),
		}
	}
	return d
}

func describePorts(ports []mesh.Port) map[string]uint16 {
	d := map[string]uint16{}
	for _, p := range ports {
		d[strconv.Itoa(int(p.ServicePort))] = p.TargetPort
	}
	return d
}

func describeLoadBalancing(lb mesh.LoadBalancing) *dumpLoadBalancer {
	if lb.Mode == mesh.LoadBalanceUnspecified && !lb.AllowUnhealthy {
		return nil
	}
	modes := map[mesh.LoadBalancingMode]string{
		mesh.LoadBalanceUnspecified: "Standard", mesh.LoadBalanceStrict: "Strict",
		mesh.LoadBalanceFailover: "Failover", mesh.LoadBalancePassthrough: "Passthrough",
	}
	scopes := map[mesh.LocalityScope]string{
		mesh.ScopeNetwork: "Network", mesh.ScopeRegion: "Region", mesh.ScopeZone: "Zone",
		mesh.ScopeSubzone: "Subzone", mesh.ScopeNode: "Node", mesh.ScopeCluster: "Cluster",
	}
	d := &dumpLoadBalancer{Mode: modes[lb.Mode], RoutingPreferences: []string{}, HealthPolicy: "OnlyHealthy"}
	for _, s := range lb.Preference {
		d.RoutingPreferences = append(d.RoutingPreferences, scopes[s])
	}
	if lb.AllowUnhealthy {
		d.HealthPolicy = "AllowAll"
	}
	return d
}

func describePolicy(a *mesh.Authorization) dumpPolicy {
	scopes := map[mesh.Scope]string{
		mesh.ScopeGlobal: "Global", mesh.ScopeNamespace: "Namespace", mesh.ScopeSelector: "WorkloadSelector",
	}
	d := dumpPolicy{
		Name: a.Name, Namespace: a.Namespace, Scope: scopes[a.Scope], DryRun: a.DryRun, Rules: [][][]dumpMatch{},
		Action: a.Action.String()[:1] + strings.ToLower(a.Action.String()[1:]),
	}
	for _, rule := range a.Rules {
		clauses := [][]dumpMatch{}
		for _, clause := range rule.Clauses {
			matches := []dumpMatch{}
			for i := range clause.Matches {
				matches = append(matches, describeMatch(&clause.Matches[i]))
			}
			clauses = append(clauses, matches)
		}
		d.Rules = append(d.Rules, clauses)
	}
	return d
}

func describeMatch(m *mesh.Match) dumpMatch {
	return dumpMatch{
		Namespaces: describeStrings(m.Namespaces), NotNamespaces: describeStrings(m.NotNamespaces),
		Principals: describeStrings(m.Principals), NotPrincipals: describeStrings(m.NotPrincipals),
		ServiceAccounts: describeAccounts(m.ServiceAccounts), NotServiceAccounts: describeAccounts(m.NotServiceAccounts),
		SourceIPs: m.SourceIPs, NotSourceIPs: m.NotSourceIPs, DestinationIPs: m.DestinationIPs, NotDestinationIPs: m.NotDestinationIPs,
		DestinationPorts: m.DestinationPorts, NotDestinationPorts: m.NotDestinationPorts,
	}
}

func describeStrings(matches []mesh.StringMatch) []map[string]any {
	var d []map[string]any
	for _, m := range matches {
		switch m.Kind {
		case mesh.MatchExact:
			d = append(d, map[string]any{"Exact": m.Value})
		case mesh.MatchPrefix:
			d = append(d, map[string]any{"Prefix": m.Value})
		case mesh.MatchSuffix:
			d = append(d, map[string]any{"Suffix": m.Value})
		case mesh.MatchPresence:
			d = append(d, map[string]any{"Presence": map[string]any{}})
		}
	}
	return d
}

func describeAccounts(matches []mesh.ServiceAccountMatch) []dumpServiceAccount {
	var d []dumpServiceAccount
	for _, m := range matches {
		d = append(d, dumpServiceAccount(m))
	}
	return d
}

func describeCertificates(s identity.Status) dumpCertificates {
	d := dumpCertificates{Identity: s.Identity.String(), State: "Initializing", CertChain: []dumpCertificate{}}
	if s.Err != nil {
		d.State = "Unavailable: " + s.Err.Error()
	}
	if s.Bundle == nil {
		return d
	}
	if s.Err == nil {
		d.State = "Available"
	}
	for _, c := range s.Bundle.Chain {
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
		d.CertChain = append(d.CertChain, dumpCertificate{
			PEM:            base64.StdEncoding.EncodeToString(text),
			SerialNumber:   c.SerialNumber.String(),
			ValidFrom:      c.NotBefore.UTC().Format(time.RFC3339),
			ExpirationTime: c.NotAfter.UTC().Format(time.RFC3339),
		})
	}
	return d
}
