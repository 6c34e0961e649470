package waypoint

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	xdsmatcher "github.com/cncf/xds/go/xds/type/matcher/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	rbachttp "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	rbacnetwork "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/rbac/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	networkinputs "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/fairlead-mesh/fairlead/internal/httproute"
)

// mainListener is the one listener that is read; the others are for Envoy's own plumbing.
const mainListener = "main_internal"

// entrance is the main listener: which chain takes a connection.
type entrance struct {
	byAddr     map[netip.Prefix]*ports
	byHostname map[string]target
	chains     map[string]*chain
	// sniffTimeout is how long to wait for the first bytes where they decide.
	sniffTimeout time.Duration
}

// ports are the targets of an address; every is for all ports.
type ports struct {
	byPort map[uint16]target
	every  *target
}

// target names chains; with both, the first bytes decide.
type target struct{ http, tcp string }

// chain is what happens to the connections of one port.
type chain struct {
	name string
	http bool
	// table names the routes of an HTTP chain, inline has them where the listener carries them itself; cluster is
	// where a TCP chain sends to.
	table   string
	inline  *httproute.Table
	cluster string
	rules   []rules
}

// find is the target of an address.
func (e *entrance) find(to netip.AddrPort) (target, bool) {
	p := e.byAddr[netip.PrefixFrom(to.Addr(), to.Addr().BitLen())]
	if p == nil {
		p = e.byRange(to.Addr())
	}
	if p == nil {
		return target{}, false
	}
	if t, ok := p.byPort[to.Port()]; ok {
		return t, true
	}
	if p.every != nil {
		return *p.every, true
	}
	return target{}, false
}

// byRange looks among the prefixes that are wider than one address, of which there are few, for the narrowest.
func (e *entrance) byRange(addr netip.Addr) *ports {
	var found *ports
	bits := -1
	for prefix, p := range e.byAddr {
		if prefix.Contains(addr) && prefix.Bits() > bits {
			found, bits = p, prefix.Bits()
		}
	}
	return found
}

// decodeListener reads the main listener.
func decodeListener(l *listenerv3.Listener) (*entrance, error) {
	e := &entrance{byAddr: map[netip.Prefix]*ports{}, byHostname: map[string]target{}, chains: map[string]*chain{},
		sniffTimeout: cmp.Or(l.GetListenerFiltersTimeout().AsDuration(), time.Second)}
	for _, fc := range l.GetFilterChains() {
		c, err := decodeChain(fc)
		if err != nil {
			return nil, fmt.Errorf("filter chain %q: %w", fc.GetName(), err)
		}
		e.chains[c.name] = c
	}
	if m := l.GetFilterChainMatcher(); m != nil {
		if err := e.decodeMatcher(m); err != nil {
			return nil, fmt.Errorf("filter chain matcher: %w", err)
		}
	}
	return e, e.check()
}

// check refuses a matcher that names chains which are not there, or of the wrong kind.
func (e *entrance) check() error {
	one := func(t target) error {
		if c := e.chains[t.http]; t.http != "" && (c == nil || !c.http) {
			return fmt.Errorf("matcher names %q, which is no HTTP filter chain", t.http)
		}
		if c := e.chains[t.tcp]; t.tcp != "" && (c == nil || c.http) {
			return fmt.Errorf("matcher names %q, which is no TCP filter chain", t.tcp)
		}
		return nil
	}
	for _, t := range e.byHostname {
		if err := one(t); err != nil {
			return err
		}
	}
	for _, p := range e.byAddr {
		if p.every != nil {
			if err := one(*p.every); err != nil {
				return err
			}
		}
		for _, t := range p.byPort {
			if err := one(t); err != nil {
				return err
			}
		}
	}
	return nil
}

// decodeMatcher reads the tree by address, then by hostname, or either alone.
func (e *entrance) decodeMatcher(m *xdsmatcher.Matcher) error {
	tree := m.GetMatcherTree()
	switch input := tree.GetInput().GetTypedConfig(); {
	case input.MessageIs(&networkinputs.DestinationIPInput{}):
		var ips xdsmatcher.IPMatcher
		if err := tree.GetCustomMatch().GetTypedConfig().UnmarshalTo(&ips); err != nil {
			return fmt.Errorf("addresses: %w", err)
		}
		for _, r := range ips.GetRangeMatchers() {
			p, err := e.decodePorts(r.GetOnMatch())
			if err != nil {
				return err
			}
			for _, c := range r.GetRanges() {
				prefix, err := decodePrefix(c)
				if err != nil {
					return err
				}
				e.byAddr[prefix] = p
			}
		}
		if next := m.GetOnNoMatch().GetMatcher(); next != nil {
			return e.decodeMatcher(next)
		}
		return nil
	case input.MessageIs(&networkinputs.FilterStateInput{}):
		for authority, on := range tree.GetExactMatchMap().GetMap() {
			t, err := e.decodeTarget(on)
			if err != nil {
				return err
			}
			e.byHostname[strings.ToLower(authority)] = t
		}
		return nil
	default:
		return fmt.Errorf("input %q is not supported", input.GetTypeUrl())
	}
}

func decodePrefix(c *xdscore.CidrRange) (netip.Prefix, error) {
	addr, err := netip.ParseAddr(c.GetAddressPrefix())
	if err != nil {
		return netip.Prefix{}, err
	}
	prefix, err := addr.Prefix(int(c.GetPrefixLen().GetValue()))
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("prefix %s/%d: %w", addr, c.GetPrefixLen().GetValue(), err)
	}
	return prefix, nil
}

func (e *entrance) decodePorts(on *xdsmatcher.Matcher_OnMatch) (*ports, error) {
	tree := on.GetMatcher().GetMatcherTree()
	if !tree.GetInput().GetTypedConfig().MessageIs(&networkinputs.DestinationPortInput{}) {
		t, err := e.decodeTarget(on)
		return &ports{every: &t}, err
	}
	p := &ports{byPort: map[uint16]target{}}
	for text, on := range tree.GetExactMatchMap().GetMap() {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			return nil, fmt.Errorf("port %q: %w", text, err)
		}
		if p.byPort[uint16(port)], err = e.decodeTarget(on); err != nil {
			return nil, err
		}
	}
	return p, nil
}

// decodeTarget reads the name of a chain, or a choice by the protocol seen.
func (e *entrance) decodeTarget(on *xdsmatcher.Matcher_OnMatch) (target, error) {
	if action := on.GetAction(); action != nil {
		name, err := chainName(action)
		if err != nil {
			return target{}, err
		}
		if c := e.chains[name]; c != nil && !c.http {
			return target{tcp: name}, nil
		}
		return target{http: name}, nil
	}
	m := on.GetMatcher()
	tree := m.GetMatcherTree()
	if !tree.GetInput().GetTypedConfig().MessageIs(&networkinputs.ApplicationProtocolInput{}) {
		return target{}, fmt.Errorf("input %q is not supported here", tree.GetInput().GetTypedConfig().GetTypeUrl())
	}
	var t target
	var err error
	for _, on := range tree.GetExactMatchMap().GetMap() {
		name, nameErr := chainName(on.GetAction())
		if nameErr != nil {
			return target{}, nameErr
		}
		if t.http != "" && t.http != name {
			return target{}, fmt.Errorf("protocols lead to both %q and %q", t.http, name)
		}
		t.http = name
	}
	t.tcp, err = chainName(m.GetOnNoMatch().GetAction())
	return t, err
}

func chainName(action *xdscore.TypedExtensionConfig) (string, error) {
	var name wrapperspb.StringValue
	if err := action.GetTypedConfig().UnmarshalTo(&name); err != nil {
		return "", fmt.Errorf("chain name: %w", err)
	}
	return name.GetValue(), nil
}

// decodeChain reads network filters: RBAC any number of times, then a connection manager or a TCP proxy.
func decodeChain(fc *listenerv3.FilterChain) (*chain, error) {
	c := &chain{name: fc.GetName()}
	done := false
	for _, f := range fc.GetFilters() {
		m, err := f.GetTypedConfig().UnmarshalNew()
		if err != nil {
			return nil, fmt.Errorf("filter %q: %w", f.GetName(), err)
		}
		if done {
			return nil, fmt.Errorf("filter %q follows a terminal filter", f.GetName())
		}
		switch m := m.(type) {
		case *rbacnetwork.RBAC:
			if err := c.addRules(m); err != nil {
				return nil, err
			}
		case *tcpproxy.TcpProxy:
			c.cluster, done = m.GetCluster(), true
			if c.cluster == "" {
				return nil, fmt.Errorf("tcp proxy names no cluster")
			}
		case *hcmv3.HttpConnectionManager:
			c.http, done = true, true
			if err := c.decodeManager(m); err != nil {
				return nil, err
			}
		default:
			return nil, fmt.Errorf("filter %q is not supported", f.GetName())
		}
	}
	if !done {
		return nil, fmt.Errorf("no terminal filter")
	}
	return c, nil
}

func (c *chain) decodeManager(m *hcmv3.HttpConnectionManager) error {
	switch {
	case m.GetRds() != nil:
		c.table = m.GetRds().GetRouteConfigName()
	case m.GetRouteConfig() != nil:
		t, err := decodeRoutes(m.GetRouteConfig())
		if err != nil {
			return fmt.Errorf("route_config: %w", err)
		}
		c.inline = t
	default:
		return fmt.Errorf("connection manager names no routes")
	}
	// The router must be last and is known by name: it has no setting that is read.
	filters := m.GetHttpFilters()
	if len(filters) == 0 || filters[len(filters)-1].GetName() != "envoy.filters.http.router" {
		return fmt.Errorf("the last HTTP filter is not the router")
	}
	for _, f := range filters[:len(filters)-1] {
		var r rbachttp.RBAC
		if err := f.GetTypedConfig().UnmarshalTo(&r); err != nil {
			return fmt.Errorf("HTTP filter %q is not supported", f.GetName())
		}
		if err := c.addRules(&r); err != nil {
			return err
		}
	}
	return nil
}

// rbacFilter is either RBAC filter.
type rbacFilter interface {
	proto.Message
	rbacRules
}

func (c *chain) addRules(f rbacFilter) error {
	r, err := decodeRules(f)
	if err != nil {
		return fmt.Errorf("rbac: %w", err)
	}
	c.rules = append(c.rules, r...)
	return nil
}

// clusters lists what a chain sends to by itself.
func (c *chain) clusters() []string {
	switch {
	case c.inline != nil:
		return tableClusters(c.inline)
	case c.cluster != "":
		return []string{c.cluster}
	default:
		return nil
	}
}

// tableClusters lists the clusters that a table's routes name, once each.
func tableClusters(t *httproute.Table) []string {
	var out []string
	for _, h := range t.Hosts {
		for _, r := range h.Routes {
			for _, w := range r.Clusters {
				out = append(out, w.Cluster)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}
