package redirect

import (
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/fairlead-mesh/fairlead/internal/mesh"
)

// Ports of the proxy in a pod's network namespace, where nftables redirects.
const (
	outboundPort  = 15001
	plaintextPort = 15006
	hbonePort     = 15008
	dnsProxyPort  = 15053
)

// Priorities that netfilter gives its own parts.
const (
	priorityMangle      = -150
	priorityDestination = -100
	priorityFilter      = 0
	prioritySource      = 100
)

// Chain is a base chain of nftables: what is done to packets at one point of their way.
type Chain struct {
	Name string
	// Kind is "filter", "nat" or "route".
	Kind string
	// Hook is the point, as unix.NF_INET_PRE_ROUTING.
	Hook uint32
	// Priority orders the chains of a point.
	Priority int32
	// Steps are tried in order; the first that matches and has a verdict ends the chain.
	Steps []Step
}

// Step is what is done to a packet that meets all of its conditions. A condition's zero value is met by every packet.
type Step struct {
	// In and Out are devices, by name.
	In, Out string
	// Source and Destination are networks; their family is a condition too.
	Source, Destination netip.Prefix
	// Protocol is unix.IPPROTO_TCP or another one.
	Protocol uint8
	// Port is the destination port; it needs Protocol.
	Port uint16
	// Opens is met by the packet that begins a TCP connection; it needs Protocol.
	Opens bool
	// Proxy is met by packets of sockets with the proxy's mark.
	Proxy bool
	// Answers is met by packets against the direction of a connection that SetConnection has noted.
	Answers bool

	Do Action
	// To is the port for Redirect.
	To uint16
}

// Action is what a step does.
type Action int

// The actions.
const (
	Accept Action = iota
	// Drop loses the packet.
	Drop
	// Reset answers with a TCP reset.
	Reset
	// Redirect gives the packet's connection to a local port; the kernel keeps the original destination.
	Redirect
	// NoteConnection marks the packet's connection as the proxy's to the application.
	NoteConnection
	// Mark gives the packet netns.RedirectMark, by which it is routed anew.
	Mark
)

// podChains decides what nftables does in a pod. It is the contract that Istio's agent has with its node proxy, so that
// either proxy works here; what it adds are the two last chains.
//
// Only packets that begin a connection are redirected: those of connections that are older than the rules must go on as
// they were. The kernel asks the chains of kind nat only for the first packet it sees of a connection, and an application
// that can send raw packets might let that be another than the one that opens it. What opens a connection and has come
// past redirection is therefore lost or reset by the last chains.
func podChains(pod PodConfig) []Chain {
	var in, out, lastIn, lastOut []Step
	if !pod.Released {
		opens := Step{Protocol: unix.IPPROTO_TCP, Opens: true}
		in = arriving(pod, opens.doing(Redirect, plaintextPort))
		out = leaving(pod, opens.doing(Redirect, outboundPort), opens.doing(Redirect, dnsProxyPort))
		lastIn = append([]Step{{Protocol: unix.IPPROTO_TCP, Port: plaintextPort}}, arriving(pod, opens.doing(Reset, 0))...)
		// A query that went to its resolver before may go on to do so.
		pod.Exclude.DNS = true
		lastOut = leaving(pod, opens.doing(Drop, 0), opens.doing(Drop, 0))
	}
	return []Chain{
		// The application's answers to the proxy, which calls from the client's address, are kept in the pod.
		{"note", "filter", unix.NF_INET_PRE_ROUTING, priorityMangle, []Step{{In: "lo", Proxy: true, Do: NoteConnection}}},
		{"answer", "route", unix.NF_INET_LOCAL_OUT, priorityMangle, []Step{{Answers: true, Do: Mark}}},
		{"in", "nat", unix.NF_INET_PRE_ROUTING, priorityDestination, in},
		{"out", "nat", unix.NF_INET_LOCAL_OUT, priorityDestination, out},
		{"last_in", "filter", unix.NF_INET_LOCAL_IN, priorityFilter, lastIn},
		{"last_out", "filter", unix.NF_INET_POST_ROUTING, priorityFilter, lastOut},
	}
}

// arriving are the steps of what comes to the pod: what is no business of the proxy is accepted, the rest meets end.
func arriving(pod PodConfig, end Step) []Step {
	steps := []Step{{In: "lo"}, {Source: host(ProbeSource4)}, {Source: host(ProbeSource6)}}
	for _, name := range pod.Exclude.Interfaces {
		steps = append(steps, Step{In: name})
	}
	steps = append(steps, Step{Protocol: unix.IPPROTO_TCP, Port: hbonePort})
	if pod.Exclude.Inbound {
		return append(steps, Step{Protocol: unix.IPPROTO_TCP})
	}
	return append(steps, excluding(pod.Exclude.In, func(s *Step, n netip.Prefix) { s.Source = n }, end)...)
}

// leaving are the steps of what the pod sends: what is no business of the proxy is accepted, queries for names meet dns,
// and the rest end.
func leaving(pod PodConfig, end, dns Step) []Step {
	steps := []Step{{Proxy: true}, {Out: "lo"}}
	for _, name := range pod.Exclude.Interfaces {
		steps = append(steps, Step{Out: name})
	}
	ends := []Step{end}
	if dns.Port = dnsPort; !pod.Exclude.DNS {
		udp := dns
		udp.Protocol, udp.Opens = unix.IPPROTO_UDP, false
		steps, ends = append(steps, udp), []Step{dns, end}
	}
	return append(steps, excluding(pod.Exclude.Out, func(s *Step, n netip.Prefix) { s.Destination = n }, ends...)...)
}

// excluding puts what is left out of one direction before the steps that connections meet in the end. set makes a network
// a condition of a step.
func excluding(x mesh.Exclusion, set func(*Step, netip.Prefix), ends ...Step) []Step {
	var steps []Step
	for _, port := range x.Ports {
		steps = append(steps, Step{Protocol: unix.IPPROTO_TCP, Port: port})
	}
	for _, n := range x.Networks {
		s := Step{Protocol: unix.IPPROTO_TCP}
		set(&s, n)
		steps = append(steps, s)
	}
	if !x.Listed {
		return append(steps, ends...)
	}
	for _, n := range x.CapturedNetworks {
		for _, s := range ends {
			set(&s, n)
			steps = append(steps, s)
		}
	}
	for _, port := range x.CapturedPorts {
		for _, s := range ends {
			if s.Port == 0 || s.Port == port {
				s.Port = port
				steps = append(steps, s)
			}
		}
	}
	return append(steps, Step{Protocol: unix.IPPROTO_TCP})
}

func (s Step) doing(a Action, to uint16) Step {
	s.Do, s.To = a, to
	return s
}

func host(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }
