package ztunnel

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/fairlead-mesh/fairlead/internal/authz"
	"github.com/fairlead-mesh/fairlead/internal/hbone"
	"github.com/fairlead-mesh/fairlead/internal/route"
)

// reason is why a connection ended as it did: one row of reasons for the access log, the metrics and the peer proxy.
type reason uint8

const (
	reasonNone reason = iota
	reasonDenied
	reasonPolicyChanged
	reasonConnect
	reasonTLS
	reasonIdentity
	reasonNoRoute
	reasonNotSynced
	reasonBadRequest
	reasonSelfCall
	reasonReset
	reasonLimit
	reasonIdle
)

// reasons gives each reason its flag (response_flags in metrics and access log) and the status a peer proxy is answered
// with.
var reasons = [...]struct {
	flag   string
	status int
}{
	reasonNone:          {"-", http.StatusOK},
	reasonDenied:        {"DENY", http.StatusUnauthorized},
	reasonPolicyChanged: {"DENY", http.StatusUnauthorized},
	reasonConnect:       {"CONNECT", http.StatusServiceUnavailable},
	reasonTLS:           {"TLS_FAILURE", http.StatusServiceUnavailable},
	reasonIdentity:      {"IDENTITY_ERROR", http.StatusServiceUnavailable},
	reasonNoRoute:       {"NO_ROUTE", http.StatusServiceUnavailable},
	reasonNotSynced:     {"NOT_SYNCED", http.StatusServiceUnavailable},
	reasonBadRequest:    {"BAD_REQUEST", http.StatusBadRequest},
	reasonSelfCall:      {"SELF_CALL", http.StatusServiceUnavailable},
	reasonReset:         {"-", http.StatusOK},
	reasonLimit:         {"LIMIT", http.StatusServiceUnavailable},
	reasonIdle:          {"IDLE", http.StatusOK},
}

func (r reason) flag() string { return reasons[r].flag }

// failure is a connection that could not be made, or was cut.
type failure struct {
	reason reason
	policy string // that decided, if one did
	err    error
}

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

func fail(r reason, format string, args ...any) *failure {
	return &failure{reason: r, err: fmt.Errorf(format, args...)}
}

// denied turns a verdict against a connection into its failure.
func denied(r reason, v authz.Verdict) *failure {
	return &failure{reason: r, policy: v.Policy, err: errors.New(v.String())}
}

// refused turns a route's refusal into the connection's failure.
func refused(d route.Decision) *failure {
	r := reasonNoRoute
	if d.Why == route.BadAuthority || d.Why == route.NotThisWorkload {
		r = reasonBadRequest
	}
	return fail(r, "%s", d.Why)
}

// classify finds the reason behind an error of the tunnel or of a dial.
func classify(err error) *failure {
	var f *failure
	var status *hbone.StatusError
	var handshake *hbone.TLSError
	switch {
	case errors.As(err, &f):
		return f
	case errors.As(err, &status) && status.Code == http.StatusUnauthorized:
		return &failure{reason: reasonDenied, err: err}
	case errors.As(err, &handshake):
		return &failure{reason: reasonTLS, err: err}
	case errors.Is(err, context.DeadlineExceeded):
		return fail(reasonConnect, "timed out: %w", err)
	}
	return &failure{reason: reasonConnect, err: err}
}
