package ztunnel

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// localFile is the format of Istio's ztunnel for LOCAL_XDS_PATH, as far as this proxy has the nouns for it.
type localFile struct {
	Workloads []localWorkload      `yaml:"workloads"`
	Services  []localService       `yaml:"services"`
	Policies  []localAuthorization `yaml:"policies"`
}

type localWorkload struct {
	UID               string                       `yaml:"uid"`
	Name              string                       `yaml:"name"`
	Namespace         string                       `yaml:"namespace"`
	TrustDomain       string                       `yaml:"trustDomain"`
	ServiceAccount    string                       `yaml:"serviceAccount"`
	WorkloadIPs       []netip.Addr                 `yaml:"workloadIps"`
	Network           string                       `yaml:"network"`
	NetworkMode       string                       `yaml:"networkMode"`
	Protocol          string                       `yaml:"protocol"`
	Hostname          string                       `yaml:"hostname"`
	Node              string                       `yaml:"node"`
	ClusterID         string                       `yaml:"clusterId"`
	Status            string                       `yaml:"status"`
	NativeTunnel      bool                         `yaml:"nativeTunnel"`
	ApplicationTunnel *localTunnel                 `yaml:"applicationTunnel"`
	Waypoint          *localGateway                `yaml:"waypoint"`
	NetworkGateway    *localGateway                `yaml:"networkGateway"`
	WorkloadName      string                       `yaml:"workloadName"`
	WorkloadType      string                       `yaml:"workloadType"`
	CanonicalName     string                       `yaml:"canonicalName"`
	CanonicalRevision string                       `yaml:"canonicalRevision"`
	Policies          []string                     `yaml:"authorizationPolicies"`
	Locality          localLocality                `yaml:"locality"`
	Capacity          *uint32                      `yaml:"capacity"`
	Services          map[string]map[uint16]uint16 `yaml:"services"`
}

type localTunnel struct {
	Protocol string `yaml:"protocol"`
	Port     uint16 `yaml:"port"`
}

type localGateway struct {
	Destination string `yaml:"destination"`
	HBONEPort   uint16 `yaml:"hboneMtlsPort"`
}

type localLocality struct {
	Region  string `yaml:"region"`
	Zone    string `yaml:"zone"`
	Subzone string `yaml:"subzone"`
}

type localService struct {
	Name            string             `yaml:"name"`
	Namespace       string             `yaml:"namespace"`
	Hostname        string             `yaml:"hostname"`
	VIPs            []string           `yaml:"vips"`
	Ports           map[uint16]uint16  `yaml:"ports"`
	SubjectAltNames []string           `yaml:"subjectAltNames"`
	Waypoint        *localGateway      `yaml:"waypoint"`
	LoadBalancer    *localLoadBalancer `yaml:"loadBalancer"`
	IPFamilies      string             `yaml:"ipFamilies"`
	Canonical       bool               `yaml:"canonical"`
}

type localLoadBalancer struct {
	RoutingPreferences []string `yaml:"routingPreferences"`
	Mode               string   `yaml:"mode"`
	HealthPolicy       string   `yaml:"healthPolicy"`
}

type localAuthorization struct {
	Name      string           `yaml:"name"`
	Namespace string           `yaml:"namespace"`
	Scope     string           `yaml:"scope"`
	Action    string           `yaml:"action"`
	DryRun    bool             `yaml:"dryRun"`
	Rules     [][][]localMatch `yaml:"rules"`
}

type localMatch struct {
	Namespaces          []localString         `yaml:"namespaces"`
	NotNamespaces       []localString         `yaml:"notNamespaces"`
	Principals          []localString         `yaml:"principals"`
	NotPrincipals       []localString         `yaml:"notPrincipals"`
	ServiceAccounts     []localServiceAccount `yaml:"serviceAccounts"`
	NotServiceAccounts  []localServiceAccount `yaml:"notServiceAccounts"`
	SourceIPs           []netip.Prefix        `yaml:"sourceIps"`
	NotSourceIPs        []netip.Prefix        `yaml:"notSourceIps"`
	DestinationIPs      []netip.Prefix        `yaml:"destinationIps"`
	NotDestinationIPs   []netip.Prefix        `yaml:"notDestinationIps"`
	DestinationPorts    []uint16              `yaml:"destinationPorts"`
	NotDestinationPorts []uint16              `yaml:"notDestinationPorts"`
}

type localServiceAccount struct {
	Namespace      string `yaml:"namespace"`
	ServiceAccount string `yaml:"serviceAccount"`
}

// localString is a string match, written as a tagged value (!Prefix abc) or as a mapping (Prefix: abc).
type localString mesh.StringMatch

func (s *localString) UnmarshalYAML(node *yaml.Node) error {
	kind, value := strings.TrimPrefix(node.Tag, "!"), node.Value
	if node.Kind == yaml.MappingNode && len(node.Content) == 2 {
		kind, value = node.Content[0].Value, node.Content[1].Value
	}
	var err error
	s.Kind, err = named(matchKinds, kind)
	if err != nil {
		return fmt.Errorf("line %d: string match: %w", node.Line, err)
	}
	if s.Kind != mesh.MatchPresence {
		s.Value = value
	}
	return nil
}

// The words of the format. The empty one is the default.
var (
	matchKinds = map[string]mesh.MatchKind{
		"Exact": mesh.MatchExact, "Prefix": mesh.MatchPrefix, "Suffix": mesh.MatchSuffix, "Presence": mesh.MatchPresence,
	}
	protocols            = map[string]mesh.Protocol{"": mesh.ProtocolNone, "TCP": mesh.ProtocolNone, "HBONE": mesh.ProtocolHBONE}
	applicationProtocols = map[string]mesh.ApplicationProtocol{"NONE": mesh.ApplicationNone, "PROXY": mesh.ApplicationProxy}
	healths              = map[string]bool{"": true, "Healthy": true, "Unhealthy": false}
	networkModes         = map[string]bool{"": false, "Standard": false, "HostNetwork": true}
	policyScopes         = map[string]mesh.Scope{
		"Global": mesh.ScopeGlobal, "Namespace": mesh.ScopeNamespace, "WorkloadSelector": mesh.ScopeSelector,
	}
	policyActions = map[string]mesh.Action{"Allow": mesh.ActionAllow, "Deny": mesh.ActionDeny}
	scopes        = map[string]mesh.LocalityScope{
		"Network": mesh.ScopeNetwork, "Region": mesh.ScopeRegion, "Zone": mesh.ScopeZone, "Subzone": mesh.ScopeSubzone,
		"Node": mesh.ScopeNode, "Cluster": mesh.ScopeCluster,
	}
	modes = map[string]mesh.LoadBalancingMode{
		"Standard": mesh.LoadBalanceUnspecified, "Strict": mesh.LoadBalanceStrict, "Failover": mesh.LoadBalanceFailover,
		"Passthrough": mesh.LoadBalancePassthrough,
	}
	healthPolicies = map[string]bool{"": false, "OnlyHealthy": false, "AllowAll": true}
)

// named is the value of a word.
func named[T any](words map[string]T, word string) (T, error) {
	value, ok := words[word]
	if !ok {
		return value, fmt.Errorf("%q is none of %q", word, slices.Sorted(maps.Keys(words)))
	}
	return value, nil
}

func (l *localWorkload) model(clusterID string) (*mesh.Workload, error) {
	w := &mesh.Workload{
		UID: l.UID, Name: l.Name, Namespace: l.Namespace, TrustDomain: l.TrustDomain, ServiceAccount: l.ServiceAccount,
		Network: l.Network, ClusterID: cmp.Or(l.ClusterID, clusterID), Node: l.Node, Addresses: l.WorkloadIPs, Hostname: l.Hostname,
		NativeTunnel: l.NativeTunnel, CanonicalName: l.CanonicalName, CanonicalRevision: l.CanonicalRevision,
		WorkloadName: l.WorkloadName, WorkloadType: cmp.Or(l.WorkloadType, "pod"), Policies: l.Policies,
		Locality: mesh.Locality{Region: l.Locality.Region, Zone: l.Locality.Zone, Subzone: l.Locality.Subzone},
		Capacity: 1,
	}
	if l.Capacity != nil {
		w.Capacity = *l.Capacity
	}
	if w.UID == "" || strings.Contains(w.UID, "/Pod/") {
		w.UID = podUID(w.ClusterID, w)
	}
	var errs [5]error
	w.Protocol, errs[0] = named(protocols, l.Protocol)
	w.Healthy, errs[1] = named(healths, l.Status)
	w.HostNetwork, errs[2] = named(networkModes, l.NetworkMode)
	w.Waypoint, errs[3] = l.Waypoint.model()
	w.NetworkGateway, errs[4] = l.NetworkGateway.model()
	if l.ApplicationTunnel != nil {
		protocol, err := named(applicationProtocols, l.ApplicationTunnel.Protocol)
		if err != nil {
			return nil, err
		}
		w.ApplicationProto, w.ApplicationPort = protocol, l.ApplicationTunnel.Port
	}
	for name, ports := range l.Services {
		key, err := hostname(name)
		if err != nil {
			return nil, err
		}
		if w.Services == nil {
			w.Services = map[mesh.NamespacedHostname][]mesh.Port{}
		}
		w.Services[key] = localPorts(ports)
	}
	return w, errors.Join(errs[:]...)
}

func (l *localService) model() (*mesh.Service, error) {
	s := &mesh.Service{
		Name: l.Name, Namespace: l.Namespace, Hostname: l.Hostname, Ports: localPorts(l.Ports),
		SubjectAltNames: l.SubjectAltNames, Canonical: l.Canonical,
	}
	if s.Namespace == "" || s.Hostname == "" {
		return nil, errors.New("without a namespace or hostname")
	}
	for _, text := range l.VIPs {
		a, err := networkAddress(text)
		if err != nil {
			return nil, err
		}
		s.Addresses = append(s.Addresses, a)
	}
	var err error
	if s.Waypoint, err = l.Waypoint.model(); err != nil {
		return nil, err
	}
	if l.LoadBalancer == nil {
		return s, nil
	}
	for _, word := range l.LoadBalancer.RoutingPreferences {
		scope, err := named(scopes, word)
		if err != nil {
			return nil, err
		}
		s.LoadBalancing.Preference = append(s.LoadBalancing.Preference, scope)
	}
	if s.LoadBalancing.Mode, err = named(modes, l.LoadBalancer.Mode); err != nil {
		return nil, err
	}
	s.LoadBalancing.AllowUnhealthy, err = named(healthPolicies, l.LoadBalancer.HealthPolicy)
	return s, err
}

func (l *localAuthorization) model() (*mesh.Authorization, error) {
	a := &mesh.Authorization{Name: l.Name, Namespace: l.Namespace, DryRun: l.DryRun}
	var errs [2]error
	a.Scope, errs[0] = named(policyScopes, l.Scope)
	a.Action, errs[1] = named(policyActions, l.Action)
	if err := errors.Join(errs[:]...); err != nil {
		return nil, err
	}
	for _, clauses := range l.Rules {
		var rule mesh.Rule
		for _, matches := range clauses {
			var clause mesh.Clause
			for i := range matches {
				clause.Matches = append(clause.Matches, matches[i].model())
			}
			rule.Clauses = append(rule.Clauses, clause)
		}
		a.Rules = append(a.Rules, rule)
	}
	return a, nil
}

func (l *localMatch) model() mesh.Match {
	return mesh.Match{
		Namespaces: stringMatches(l.Namespaces), NotNamespaces: stringMatches(l.NotNamespaces),
		Principals: stringMatches(l.Principals), NotPrincipals: stringMatches(l.NotPrincipals),
		ServiceAccounts: accountMatches(l.ServiceAccounts), NotServiceAccounts: accountMatches(l.NotServiceAccounts),
		SourceIPs: l.SourceIPs, NotSourceIPs: l.NotSourceIPs,
		DestinationIPs: l.DestinationIPs, NotDestinationIPs: l.NotDestinationIPs,
		DestinationPorts: l.DestinationPorts, NotDestinationPorts: l.NotDestinationPorts,
	}
}

func stringMatches(from []localString) []mesh.StringMatch {
	var to []mesh.StringMatch
	for _, s := range from {
		to = append(to, mesh.StringMatch(s))
	}
	return to
}

func accountMatches(from []localServiceAccount) []mesh.ServiceAccountMatch {
	var to []mesh.ServiceAccountMatch
	for _, s := range from {
		to = append(to, mesh.ServiceAccountMatch(s))
	}
	return to
}

// model is nil for nil. A destination is "<network>/<ip>" or "<namespace>/<hostname>".
func (l *localGateway) model() (*mesh.GatewayAddress, error) {
	if l == nil {
		return nil, nil
	}
	g := &mesh.GatewayAddress{HBONEPort: cmp.Or(l.HBONEPort, 15008)}
	if a, err := networkAddress(l.Destination); err == nil {
		g.Address = a
		return g, nil
	}
	var err error
	g.Hostname, err = hostname(l.Destination)
	return g, err
}

func networkAddress(text string) (mesh.NetworkAddress, error) {
	network, address, ok := strings.Cut(text, "/")
	ip, err := netip.ParseAddr(address)
	if !ok || err != nil {
		return mesh.NetworkAddress{}, fmt.Errorf("address %q: want <network>/<ip>", text)
	}
	return mesh.NetworkAddress{Network: network, Address: ip}, nil
}

func hostname(text string) (mesh.NamespacedHostname, error) {
	namespace, host, ok := strings.Cut(text, "/")
	if !ok || namespace == "" || host == "" {
		return mesh.NamespacedHostname{}, fmt.Errorf("name %q: want <namespace>/<hostname>", text)
	}
	return mesh.NamespacedHostname{Namespace: namespace, Hostname: host}, nil
}

func localPorts(ports map[uint16]uint16) []mesh.Port {
	var to []mesh.Port
	for _, service := range slices.Sorted(maps.Keys(ports)) {
		to = append(to, mesh.Port{ServicePort: service, TargetPort: ports[service]})
	}
	return to
}
