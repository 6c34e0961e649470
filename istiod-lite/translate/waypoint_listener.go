package translate

import (
	"net/netip"
	"strconv"
	"time"

	xdscore "github.com/cncf/xds/go/xds/core/v3"
	xdsmatcher "github.com/cncf/xds/go/xds/type/matcher/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	filterstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	httpstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	httpinspector "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/http_inspector/v3"
	originaldst "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpproxy "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	networkinputs "github.com/envoyproxy/go-control-plane/envoy/extensions/matching/common_inputs/network/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Filter state that connect_terminate sets and the inner listener reads: what the CONNECT asked for, and the SPIFFE ID
// that the client proxy proved.
const (
	authorityState = "io.istio.connect_authority"
	principalState = "io.istio.peer_principal"
	// sniffTimeout is how long a client of a port of unknown protocol may stay silent before its bytes are taken as TCP.
	sniffTimeout = time.Second
)

// way is how connections to some addresses find their filter chain.
type way struct {
	addresses []netip.Addr
	// hostname is an address of its own: CONNECT <hostname>:<port>.
	hostname string
	ports    []portWay
}

// portWay names the chains of a port; with both, the first bytes decide. Port 0 means every port.
type portWay struct {
	port      uint16
	http, tcp string
}

// addMainListener makes the listeners, once all chains and ways are known.
func (w *waypointBuilder) addMainListener() {
	addresses := &xdsmatcher.IPMatcher{}
	hostnames := map[string]*xdsmatcher.Matcher_OnMatch{}
	for _, way := range w.ways {
		if len(way.ports) == 0 {
			continue
		}
		if way.hostname != "" {
			for _, p := range way.ports {
				hostnames[way.hostname+":"+strconv.Itoa(int(p.port))] = toChain(p)
			}
		}
		if len(way.addresses) == 0 {
			continue
		}
		ranges := &xdsmatcher.IPMatcher_IPRangeMatcher{OnMatch: toPort(way.ports)}
		for _, a := range way.addresses {
			ranges.Ranges = append(ranges.Ranges, &xdscore.CidrRange{
				AddressPrefix: a.String(), PrefixLen: wrapperspb.UInt32(uint32(a.BitLen()))})
		}
		addresses.RangeMatchers = append(addresses.RangeMatchers, ranges)
	}
	matcher := &xdsmatcher.Matcher{}
	if len(hostnames) > 0 {
		matcher.OnNoMatch = onMatcher(exactTree(networkInput(authorityState, &networkinputs.FilterStateInput{Key: authorityState}), hostnames))
	}
	if len(addresses.RangeMatchers) > 0 {
		matcher.MatcherType = &xdsmatcher.Matcher_MatcherTree_{MatcherTree: &xdsmatcher.Matcher_MatcherTree{
			Input:    networkInput("ip", &networkinputs.DestinationIPInput{}),
			TreeType: &xdsmatcher.Matcher_MatcherTree_CustomMatch{CustomMatch: networkInput("ip", addresses)},
		}}
	} else if matcher.OnNoMatch != nil {
		matcher = matcher.OnNoMatch.GetMatcher()
	}
	l := &listenerv3.Listener{
		Name:              mainInternal,
		ListenerSpecifier: &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		TrafficDirection:  corev3.TrafficDirection_INBOUND,
		ListenerFilters:   []*listenerv3.ListenerFilter{listenerFilter("envoy.filters.listener.original_dst", &originaldst.OriginalDst{})},
		FilterChains:      w.chains,
	}
	if len(w.chains) > 0 {
		l.FilterChainMatcher = matcher
	}
	if w.sniffed {
		l.ListenerFilters = append(l.ListenerFilters, listenerFilter("envoy.filters.listener.http_inspector", &httpinspector.HttpInspector{}))
		l.ListenerFiltersTimeout = durationpb.New(sniffTimeout)
		l.ContinueOnListenerFiltersTimeout = true
	}
	w.listeners = append(w.listeners, l, w.terminateListener(), originateListener())
}

func toPort(ports []portWay) *xdsmatcher.Matcher_OnMatch {
	if len(ports) == 1 && ports[0].port == 0 {
		return toChain(ports[0])
	}
	byPort := map[string]*xdsmatcher.Matcher_OnMatch{}
	for _, p := range ports {
		byPort[strconv.Itoa(int(p.port))] = toChain(p)
	}
	return onMatcher(exactTree(networkInput("port", &networkinputs.DestinationPortInput{}), byPort))
}

func toChain(p portWay) *xdsmatcher.Matcher_OnMatch {
	switch {
	case p.tcp == "":
		return onChain(p.http)
	case p.http == "":
		return onChain(p.tcp)
	}
	tree := exactTree(networkInput("application-protocol", &networkinputs.ApplicationProtocolInput{}), map[string]*xdsmatcher.Matcher_OnMatch{
		"'http/1.0'": onChain(p.http), "'http/1.1'": onChain(p.http), "'h2c'": onChain(p.http)})
	tree.OnNoMatch = onChain(p.tcp)
	return onMatcher(tree)
}

func onChain(name string) *xdsmatcher.Matcher_OnMatch {
	return &xdsmatcher.Matcher_OnMatch{OnMatch: &xdsmatcher.Matcher_OnMatch_Action{
		Action: networkInput(name, wrapperspb.String(name))}}
}

func onMatcher(m *xdsmatcher.Matcher) *xdsmatcher.Matcher_OnMatch {
	return &xdsmatcher.Matcher_OnMatch{OnMatch: &xdsmatcher.Matcher_OnMatch_Matcher{Matcher: m}}
}

func exactTree(input *xdscore.TypedExtensionConfig, to map[string]*xdsmatcher.Matcher_OnMatch) *xdsmatcher.Matcher {
	return &xdsmatcher.Matcher{MatcherType: &xdsmatcher.Matcher_MatcherTree_{MatcherTree: &xdsmatcher.Matcher_MatcherTree{
		Input:    input,
		TreeType: &xdsmatcher.Matcher_MatcherTree_ExactMatchMap{ExactMatchMap: &xdsmatcher.Matcher_MatcherTree_MatchMap{Map: to}},
	}}}
}

func networkInput(name string, m proto.Message) *xdscore.TypedExtensionConfig {
	return &xdscore.TypedExtensionConfig{Name: name, TypedConfig: pack(m)}
}

// httpChain is the filters of an HTTP port: authorization, then the routes of the table that has the cluster's name.
func httpChain(name string, policies []boundPolicy) *listenerv3.FilterChain {
	m := &hcmv3.HttpConnectionManager{
		CodecType:  hcmv3.HttpConnectionManager_AUTO,
		StatPrefix: name,
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			ConfigSource: adsSource(), RouteConfigName: name}},
		NormalizePath:     wrapperspb.Bool(true),
		StreamIdleTimeout: durationpb.New(0),
		UpgradeConfigs:    []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "websocket"}},
		HttpFilters:       append(httpAuthorization(policies), httpFilter("envoy.filters.http.router", &routerv3.Router{})),
	}
	return &listenerv3.FilterChain{Name: name, Filters: []*listenerv3.Filter{networkFilter("envoy.filters.network.http_connection_manager", m)}}
}

// tcpChain is the filters of a TCP port: authorization by what is known of a connection, then the cluster.
func tcpChain(name string, policies []boundPolicy) *listenerv3.FilterChain {
	proxy := &tcpproxy.TcpProxy{StatPrefix: name, ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: name}, IdleTimeout: durationpb.New(0)}
	return &listenerv3.FilterChain{Name: name, Filters: append(tcpAuthorization(policies), networkFilter("envoy.filters.network.tcp_proxy", proxy))}
}

// terminateListener ends the tunnels of client proxies. Fairlead's waypoint does this itself and does not read it.
func (w *waypointBuilder) terminateListener() *listenerv3.Listener {
	state := &httpstatev3.Config{OnRequestHeaders: []*filterstatev3.FilterStateValue{
		stateValue("envoy.filters.listener.original_dst.local_ip", "", "%REQ(:AUTHORITY)%"),
		stateValue(authorityState, "envoy.string", "%REQ(:AUTHORITY)%"),
		stateValue(principalState, "envoy.string", "%DOWNSTREAM_PEER_URI_SAN%"),
	}}
	connect := &routev3.Route{
		Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_ConnectMatcher_{ConnectMatcher: &routev3.RouteMatch_ConnectMatcher{}}},
		Action: &routev3.Route_Route{Route: &routev3.RouteAction{
			ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: mainInternal},
			Timeout:          durationpb.New(0),
			UpgradeConfigs: []*routev3.RouteAction_UpgradeConfig{{
				UpgradeType: "CONNECT", ConnectConfig: &routev3.RouteAction_UpgradeConfig_ConnectConfig{}}},
		}},
	}
	m := &hcmv3.HttpConnectionManager{
		StatPrefix: connectTerminate,
		RouteSpecifier: &hcmv3.HttpConnectionManager_RouteConfig{RouteConfig: &routev3.RouteConfiguration{
			Name: "default", VirtualHosts: []*routev3.VirtualHost{{Name: "default", Domains: []string{"*"}, Routes: []*routev3.Route{connect}}}}},
		Http2ProtocolOptions: &corev3.Http2ProtocolOptions{AllowConnect: true},
		UpgradeConfigs:       []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "CONNECT"}},
		StreamIdleTimeout:    durationpb.New(0),
		HttpFilters: []*hcmv3.HttpFilter{httpFilter("envoy.filters.http.set_filter_state", state),
			httpFilter("envoy.filters.http.router", &routerv3.Router{})},
	}
	return &listenerv3.Listener{
		Name:    connectTerminate,
		Address: socketAddress(netip.AddrPortFrom(netip.IPv6Unspecified(), hbonePort)),
		FilterChains: []*listenerv3.FilterChain{{
			Name: "default",
			TransportSocket: &corev3.TransportSocket{Name: "tls", ConfigType: &corev3.TransportSocket_TypedConfig{
				TypedConfig: pack(&tlsv3.DownstreamTlsContext{
					RequireClientCertificate: wrapperspb.Bool(true), CommonTlsContext: tunnelTLS(w.in.TrustDomain)})}},
			Filters: []*listenerv3.Filter{networkFilter("envoy.filters.network.http_connection_manager", m)},
		}},
	}
}

func stateValue(key, factory, format string) *filterstatev3.FilterStateValue {
	return &filterstatev3.FilterStateValue{
		Key: &filterstatev3.FilterStateValue_ObjectKey{ObjectKey: key}, FactoryKey: factory,
		Value: &filterstatev3.FilterStateValue_FormatString{FormatString: &corev3.SubstitutionFormatString{
			Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
				Specifier: &corev3.DataSource_InlineString{InlineString: format}}}}},
		SharedWithUpstream: filterstatev3.FilterStateValue_ONCE, SkipIfEmpty: true,
	}
}

// originateListener opens the tunnels towards endpoints. Fairlead's waypoint does this itself and does not read it.
func originateListener() *listenerv3.Listener {
	proxy := &tcpproxy.TcpProxy{
		StatPrefix: connectOriginate, ClusterSpecifier: &tcpproxy.TcpProxy_Cluster{Cluster: connectOriginate},
		TunnelingConfig: &tcpproxy.TcpProxy_TunnelingConfig{
			Hostname: "%DOWNSTREAM_LOCAL_ADDRESS%",
			HeadersToAdd: []*corev3.HeaderValueOption{{
				Header: &corev3.HeaderValue{Key: "x-istio-source", Value: "waypoint"}}},
		},
	}
	return &listenerv3.Listener{
		Name:              connectOriginate,
		ListenerSpecifier: &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		ListenerFilters:   []*listenerv3.ListenerFilter{listenerFilter("envoy.filters.listener.original_dst", &originaldst.OriginalDst{})},
		FilterChains: []*listenerv3.FilterChain{{Name: connectOriginate,
			Filters: []*listenerv3.Filter{networkFilter("envoy.filters.network.tcp_proxy", proxy)}}},
	}
}

// tunnelTLS is mutual TLS 1.3 within the trust domain; the certificates come by SDS under Istio's names, from the agent
// beside an Envoy.
func tunnelTLS(trustDomain string) *tlsv3.CommonTlsContext {
	sds := func(name string) *tlsv3.SdsSecretConfig {
		return &tlsv3.SdsSecretConfig{Name: name, SdsConfig: &corev3.ConfigSource{ResourceApiVersion: corev3.ApiVersion_V3,
			ConfigSourceSpecifier: &corev3.ConfigSource_ApiConfigSource{ApiConfigSource: &corev3.ApiConfigSource{
				ApiType: corev3.ApiConfigSource_GRPC, TransportApiVersion: corev3.ApiVersion_V3,
				GrpcServices: []*corev3.GrpcService{{TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{
					EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{ClusterName: "sds-grpc"}}}}}}}}
	}
	return &tlsv3.CommonTlsContext{
		AlpnProtocols: []string{"h2"},
		TlsParams: &tlsv3.TlsParameters{
			TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3, TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3},
		TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{sds("default")},
		ValidationContextType: &tlsv3.CommonTlsContext_CombinedValidationContext{
			CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
				ValidationContextSdsSecretConfig: sds("ROOTCA"),
				DefaultValidationContext: &tlsv3.CertificateValidationContext{
					MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{{SanType: tlsv3.SubjectAltNameMatcher_URI,
						Matcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: "spiffe://" + trustDomain + "/"}}}},
				}}},
	}
}

func networkFilter(name string, m proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(m)}}
}

func listenerFilter(name string, m proto.Message) *listenerv3.ListenerFilter {
	return &listenerv3.ListenerFilter{Name: name, ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: pack(m)}}
}

func httpFilter(name string, m proto.Message) *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{Name: name, ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: pack(m)}}
}
