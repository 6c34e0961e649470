// Package httproute (decisions) chooses where an HTTP request goes: a table of virtual hosts and ordered routes, the
// request's facts and a random number in; the route, the cluster and the reason out.
//
// The steps of a request's way through a waypoint that are decided here:
//  1. The virtual host is the one whose domain fits the request's host best.
//  2. The first of its routes whose match holds is taken; Compare is the order the Gateway API wants them in.
//  3. The route redirects, answers by itself, or names weighted clusters, of which the random number picks one.
//  4. RequestChange and ResponseChange say how headers, host and path change on the way.
//
// Next: waypoint/forward.go.
package httproute

import (
	"net"
	"strings"
	"time"
)

// Request is what routing may know of a request.
type Request struct {
	Method string
	// Host is the Host header or :authority, with its port if it had one.
	Host string
	// Path is the normalised path, without the query.
	Path string
	// RawQuery is the part after the question mark, not decoded.
	RawQuery string
	// Header returns the value of a header (several joined by commas) and whether there is one. Names are matched
	// without regard to case.
	Header func(name string) (string, bool)
}

// Table is the routes of one port of one service.
type Table struct {
	Name  string
	Hosts []Host
}

// Host is the routes for some domains. A domain is a name, "*.suffix", "prefix.*", or "*" for all.
type Host struct {
	Name    string
	Domains []string
	Routes  []Route
}

// Route is one match and what then happens: exactly one of Clusters, Redirect and Answer is set.
type Route struct {
	// Name tells people which object and rule the route comes from.
	Name     string
	Match    Match
	Clusters []Weighted
	Redirect *Redirect
	Answer   *Answer
	Change   Change
	Rewrite  Rewrite
	// Timeout is for the whole request, 0 for none; AttemptTimeout for each attempt.
	Timeout        time.Duration
	AttemptTimeout time.Duration
	Retry          Retry
}

// Weighted is a cluster and its share of the requests: Weight out of the sum of the route's weights.
type Weighted struct {
	Cluster string
	Weight  uint32
	Change  Change
}

// Answer is a response made without asking anyone.
type Answer struct {
	Status int
	Body   string
}

// Retry says when a request may be tried again on another endpoint. Failures to connect always may, twice.
type Retry struct {
	// Attempts beyond the first; 0 means the default.
	Attempts uint32
	// Statuses of responses that are tried again.
	Statuses []int
	// Backoff before another attempt.
	Backoff time.Duration
}

// Reason says how a decision came about.
type Reason uint8

// The reasons.
const (
	// Matched: a route matched and has somewhere to go.
	Matched Reason = iota
	// NoHost: no virtual host is for the request's host.
	NoHost
	// NoRoute: no route of the virtual host matches.
	NoRoute
	// NoCluster: the route has no cluster with a weight.
	NoCluster
)

func (r Reason) String() string {
	switch r {
	case NoHost:
		return "no virtual host for this host"
	case NoRoute:
		return "no route matches"
	case NoCluster:
		return "the route has no backend"
	default:
		return "matched"
	}
}

// Decision is where a request goes. Route is nil when nothing matched; Cluster is nil unless the request is forwarded.
type Decision struct {
	Route   *Route
	Cluster *Weighted
	Reason  Reason
}

// Select decides for one request. rnd is any random number; it picks among weighted clusters.
func (t *Table) Select(r *Request, rnd uint64) Decision {
	h := t.host(r.Host)
	if h == nil {
		return Decision{Reason: NoHost}
	}
	for i := range h.Routes {
		route := &h.Routes[i]
		if !route.Match.Matches(r) {
			continue
		}
		if route.Redirect != nil || route.Answer != nil {
			return Decision{Route: route}
		}
		c := pick(route.Clusters, rnd)
		if c == nil {
			return Decision{Route: route, Reason: NoCluster}
		}
		return Decision{Route: route, Cluster: c}
	}
	return Decision{Reason: NoRoute}
}

// pick gives each cluster its share of the numbers; nil when no cluster has a weight.
func pick(clusters []Weighted, rnd uint64) *Weighted {
	var sum uint64
	for i := range clusters {
		sum += uint64(clusters[i].Weight)
	}
	if sum == 0 {
		return nil
	}
	at := rnd % sum
	for i := range clusters {
		w := uint64(clusters[i].Weight)
		if at < w {
			return &clusters[i]
		}
		at -= w
	}
	return nil
}

// host finds the virtual host whose domain fits best: exact, then the longest "*.suffix", then the longest "prefix.*",
// then "*". A domain without a port fits a host with any.
func (t *Table) host(name string) *Host {
	name = strings.ToLower(name)
	bare := name
	if h, _, err := net.SplitHostPort(name); err == nil {
		bare = h
	}
	var best *Host
	rank := -1
	for i := range t.Hosts {
		for _, d := range t.Hosts[i].Domains {
			if r := max(domainRank(d, name), domainRank(d, bare)); r > rank {
				best, rank = &t.Hosts[i], r
			}
		}
	}
	return best
}

const (
	rankSuffix = 1 << 20
	rankExact  = 1 << 21
)

// domainRank orders the domains that fit a name, the most specific highest; -1 for one that does not fit.
func domainRank(domain, name string) int {
	domain = strings.ToLower(domain)
	switch {
	case domain == "*":
		return 0
	case domain == name:
		return rankExact
	case strings.HasPrefix(domain, "*") && len(name) >= len(domain) && strings.HasSuffix(name, domain[1:]):
		return rankSuffix + len(domain)
	case strings.HasSuffix(domain, "*") && len(name) >= len(domain) && strings.HasPrefix(name, domain[:len(domain)-1]):
		return len(domain)
	default:
		return -1
	}
}
